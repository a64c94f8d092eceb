# SPDX-License-Identifier: Apache-2.0
"""Labels, and what the lines of several metrics have in common."""

from nbdtarget.control.fields import BelowLine, Remote
from nbdtarget.control.figures import OperationFigures, TargetFigures
from nbdtarget.monitor.groups import Groups, label_text
from tests.support.figures import figures_of

NAMES = ("device", "disk")


def test_what_prometheus_would_take_for_something_else_is_escaped() -> None:
    text = label_text(NAMES, ('a "b"', "c\\d\ne % {}"))
    assert text == r'{device="a \"b\"",disk="c\\d\ne % {}"}'
    assert label_text(("device",), ("ä",)) == '{device="ä"}'


def test_an_operation_has_the_devices_that_were_asked_for_it() -> None:
    figures = figures_of(name="a")
    other = figures_of(name="b").devices
    read = OperationFigures(1, 512)
    other[0].operations["read"] = read
    figures.devices += other
    group = Groups(figures).operation("read")
    assert (group.keys, group.things) == ([("b",)], [read])
    assert group.texts == ['{device="b"}']
    assert Groups(figures).operation("write").things == []


def test_targets_of_several_types() -> None:
    figures = figures_of(
        TargetFigures(0, 8, "linear", {}),
        TargetFigures(8, 8, "cache", {}),
        TargetFigures(16, 8, "clone", {}),
    )
    groups = Groups(figures)
    assert groups.targets("clone cache").keys == [("d", "8"), ("d", "16")]
    assert groups.targets("clone").keys == [("d", "16")]
    assert groups.infos.keys == [("d", "", "linear+cache+clone")]


def test_disks_of_one_name_are_one_line() -> None:
    figures = figures_of()
    remote = Remote(requests=1, retries=2, received_bytes=3, away_s=0.5)
    figures.devices[0].below = (
        BelowLine("x", "ok", errors={"read": 1}),
        BelowLine("y"),
        BelowLine("x", "latched", errors={"read": 2, "write": 3}, remote=remote),
        BelowLine("x", "ok", remote=remote),
    )
    groups = Groups(figures)
    one, other = groups.lower_disks.things
    assert (one.name, one.state, one.errors) == (
        "x",
        "latched",
        {"read": 3, "write": 3},
    )
    assert (other.name, other.state, other.errors) == ("y", "ok", {})
    assert groups.remote_disks.keys == [("d", "x")]
    assert groups.remote_disks.things == [Remote(2, 4, 6, 1.0)]
