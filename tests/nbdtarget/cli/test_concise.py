# SPDX-License-Identifier: Apache-2.0
"""Devices on one line, in the concise form of dmsetup."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.cli.concise import ConciseDevice, format_concise, parse_concise
from nbdtarget.common.errors import NbdTargetError


def test_the_example_of_the_manual() -> None:
    text = "dev1,,,,0 100 linear 253:1 0,100 100 error;dev2,,,ro,0 1 error"
    first, second = parse_concise(text)
    lines = ("0 100 linear 253:1 0", "100 100 error")
    assert first == ConciseDevice("dev1", "", None, False, lines)
    assert second == ConciseDevice("dev2", "", None, True, ("0 1 error",))


def test_what_table_prints_reads_back() -> None:
    text = "b,UUID-B,1,rw,0 8 linear /b 0,8 8 error ;n,,2,rw;r,,3,ro,0 8 zero "
    assert format_concise(parse_concise(text)) == text


def test_specials_are_escaped() -> None:
    device = ConciseDevice("a;b", "u,v", None, False, (r"0 8 linear /my\ disk,1 0",))
    assert format_concise([device]) == (r"a\;b,u\,v,,rw,0 8 linear /my\\ disk\,1 0")
    assert parse_concise(format_concise([device])) == [device]
    # As a user writes it by hand.
    (by_hand,) = parse_concise(r"x,,,,0 8 linear /my\ disk 0")
    assert by_hand.lines == (r"0 8 linear /my\ disk 0",)


def test_empty_text_describes_no_device() -> None:
    assert parse_concise("") == parse_concise(";\n") == []


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("c9", "Five comma-separated fields are required for each device: c9 has 1"),
        (",,", "has 3"),
        ("c9,,,xx,0 8 zero", "c9: Invalid flags parameter 'xx' must be 'ro' or 'rw'"),
        ("c9,,y,ro,0 8 zero", "c9: invalid minor number 'y'"),
    ],
)
def test_what_is_refused(text: str, reason: str) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        parse_concise(text)


words = st.text(st.characters(exclude_categories=["Cs", "Cc", "Zs"]), min_size=1)


@given(
    st.lists(
        st.builds(
            ConciseDevice,
            words,
            st.one_of(st.just(""), words),
            st.one_of(st.none(), st.integers(0, 10**6)),
            st.booleans(),
            st.lists(words, max_size=3).map(tuple),
        ),
        max_size=3,
    )
)
def test_round_trip(devices: list[ConciseDevice]) -> None:
    assert parse_concise(format_concise(devices)) == devices
