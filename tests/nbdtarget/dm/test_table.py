# SPDX-License-Identifier: Apache-2.0
"""Table text: what is a table, and what it is refused for."""

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.dm.table import TargetSpec, parse_table
from nbdtarget.targets.registry import TARGET_TYPES


def parse(text: str) -> tuple[TargetSpec, ...]:
    return parse_table(text, TARGET_TYPES)


def test_parse_one_line() -> None:
    assert parse("0 8 linear /dev/a 16") == (
        TargetSpec(0, 4096, "linear", ("/dev/a", "16")),
    )


def test_parse_several_lines_with_blank_lines_and_comments() -> None:
    text = "\n# a comment\n0 8 linear /a 0\n\n   # one more\n8 2 error\n\t10 6  zero \n"
    assert parse(text) == (
        TargetSpec(0, 4096, "linear", ("/a", "0")),
        TargetSpec(4096, 1024, "error", ()),
        TargetSpec(5120, 3072, "zero", ()),
    )


def test_parse_takes_a_blank_in_a_path_when_escaped() -> None:
    (spec,) = parse(r"0 8 linear /my\ disks/a\\b 0")
    assert spec.args == ("/my disks/a\\b", "0")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Empty table"),
        ("# nothing\n\n", "Empty table"),
        ("0 8", "Invalid format on line 1 of table"),
        ("0", "Invalid format on line 1 of table"),
        ("x 8 zero", "Invalid format on line 1 of table"),
        ("-1 8 zero", "Invalid format on line 1 of table"),
        ("0 8.5 zero", "Invalid format on line 1 of table"),
        ("0 \u0668 zero", "Invalid format on line 1 of table"),
        ("0 " + "9" * 5000 + " zero", "Invalid format on line 1 of table"),
        ("0 8 zero\nzero", "Invalid format on line 2 of table"),
        ("0 0 zero", "zero-length target"),
        ("0 8 nonsense", "nonsense: unknown target type"),
        ("0 8 LINEAR /a 0", "LINEAR: unknown target type"),
        ("1 8 zero", "Gap in table"),
        ("0 8 zero\n9 8 zero", "Gap in table"),
        ("0 8 zero\n7 8 zero", "Gap in table"),
        ("0 18446744073709551615 zero", "too large"),
        ("0 8 zero\n8 18014398509481984 zero", "too large"),
    ],
)
def test_parse_refuses(text: str, reason: str) -> None:
    with pytest.raises(TableError) as caught:
        parse(text)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)


def test_only_a_line_feed_ends_a_line() -> None:
    (spec,) = parse_table("0 8 linear /srv/a\\\u2028b 0\r\n", TARGET_TYPES)
    assert spec.args == ("/srv/a\u2028b", "0")
