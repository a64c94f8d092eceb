# SPDX-License-Identifier: Apache-2.0
"""Numbers of clones and caches: which field they are, and what they are multiplied by."""

import pytest

from nbdtarget.control.figures import TargetFigures
from nbdtarget.monitor.groups import Groups
from nbdtarget.monitor.target_families import TARGET
from tests.support.figures import figures_of


def value(name: str, kind: str, **fields: float | str | None) -> float | None:
    (family,) = [each for each in TARGET if each.name == f"nbdtarget_{name}"]
    assert family.column is not None
    groups = Groups(figures_of(TargetFigures(0, 8, kind, fields)))
    (found,) = family.column(groups).values
    return found


@pytest.mark.parametrize(
    ("name", "kind", "fields", "expected"),
    [
        ("cache_written_back_bytes_total", "cache", {"written_back_bytes": 7}, 7),
        ("cache_written_back_bytes_total", "cache", {}, None),
        ("clone_source_away_seconds_total", "clone", {"source_away_s": 1.5}, 1.5),
        ("clone_source_away_seconds_total", "clone", {"source_away_s": None}, 0),
        (
            "cache_used_bytes",
            "cache",
            {"cache_blocks_used": 3, "block_size_bytes": 4096},
            12288,
        ),
        ("metadata_read_only", "clone", {"mode": "ro"}, 1),
        ("metadata_read_only", "cache", {"mode": "rw"}, 0),
    ],
)
def test_a_number_of_the_status(
    name: str,
    kind: str,
    fields: dict[str, float | str | None],
    expected: float | None,
) -> None:
    assert value(name, kind, **fields) == expected
