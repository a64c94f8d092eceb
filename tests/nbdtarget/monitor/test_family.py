# SPDX-License-Identifier: Apache-2.0
"""A family has exactly one way to its values."""

from nbdtarget.control.figures import TargetFigures
from nbdtarget.monitor.families import FAMILIES
from nbdtarget.monitor.family import COUNTER, GAUGE, HISTOGRAM, rows_of
from nbdtarget.monitor.groups import Groups, label_text
from tests.support.figures import figures_of
from tests.support.served import Served


def test_a_family_has_one_source_and_a_type_of_prometheus() -> None:
    for family in FAMILIES:
        assert (family.rows is None) != (family.column is None), family.name
        assert family.kind in (COUNTER, GAUGE, HISTOGRAM)


async def test_a_column_has_the_labels_of_its_family(served: Served) -> None:
    groups = Groups(await served.figures())
    for family in FAMILIES:
        if family.column is None:
            continue
        keys, texts, values = family.column(groups)
        assert len(keys) == len(texts) == len(list(values))
        assert texts == [label_text(family.labels, each) for each in keys]


def test_lines_without_a_value_are_left_out() -> None:
    figures = figures_of(
        TargetFigures(0, 8, "cache", {"written_back_bytes": 5}),
        TargetFigures(8, 8, "cache", {"written_back_bytes": None}),
    )
    name = "nbdtarget_cache_written_back_bytes_total"
    (family,) = [each for each in FAMILIES if each.name == name]
    assert list(rows_of(family, Groups(figures))) == [("", ("d", "0"), 5)]
