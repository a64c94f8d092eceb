# SPDX-License-Identifier: Apache-2.0
"""The list of metrics follows Prometheus' rules, and each family of a target reads a field that the target has."""

from nbdtarget.control.fields import BelowLine, Remote
from nbdtarget.control.status_fields import STATUS_FIELDS
from nbdtarget.monitor.families import DEVICE, FAMILIES, TARGET
from nbdtarget.monitor.family import rows_of
from nbdtarget.monitor.groups import Groups
from tests.support.served import Served


def test_names_are_unique_and_say_what_they_count() -> None:
    names = [family.name for family in FAMILIES]
    assert len(set(names)) == len(names)
    for family in FAMILIES:
        assert family.name.startswith("nbdtarget_")
        assert family.name.endswith("_total") is (family.kind == "counter")
        assert family.help.endswith(".")


async def test_each_family_of_a_target_has_a_value(served: Served) -> None:
    groups = Groups(await served.figures())
    devices = {"clone": ["c"], "cache": ["k"]}
    assert devices.keys() <= STATUS_FIELDS.keys()
    for family in TARGET:
        kind = family.name.split("_")[1]
        rows = list(rows_of(family, groups))
        labels = [labels for _, labels, _ in rows]
        expected = devices.get(kind, ["c", "k"])
        assert labels == [(each, "0") for each in expected], family.name
        assert all(value >= 0 for _, _, value in rows)


async def test_no_line_comes_twice(served: Served) -> None:
    groups = Groups(await served.figures())
    for family in FAMILIES:
        rows = [(suffix, labels) for suffix, labels, _ in rows_of(family, groups)]
        assert len(set(rows)) == len(rows), family.name
        for suffix, labels in rows:
            assert len(labels) == len(family.labels) + (suffix == "_bucket")


async def test_hydrated_bytes_of_a_short_last_region_are_not_more_than_the_disk(
    served: Served,
) -> None:
    figures = await served.figures("c")
    (target,) = figures.devices[0].targets
    target.length -= 1
    target.fields["regions_hydrated"] = target.fields["regions_total"]
    (family,) = [each for each in TARGET if each.name.endswith("hydrated_bytes")]
    assert [value for _, _, value in rows_of(family, Groups(figures))] == [
        target.length * 512
    ]


async def test_disks_of_other_machines_that_have_one_name_are_one_line(
    served: Served,
) -> None:
    figures = await served.figures("c")
    (device,) = figures.devices
    remote = Remote(requests=2, retries=1, received_bytes=4096, away_s=0.5)
    device.below = (
        BelowLine("nbd://a", remote=remote),
        BelowLine("nbd://a", remote=remote),
        BelowLine("/dev/sdb"),
    )
    groups = Groups(figures)
    found = {
        family.name: list(rows_of(family, groups))
        for family in DEVICE
        if family.name.startswith("nbdtarget_lower_disk_")
    }
    for name, value in (
        ("requests_total", 4),
        ("retries_total", 2),
        ("received_bytes_total", 8192),
        ("away_seconds_total", 1.0),
    ):
        rows = found[f"nbdtarget_lower_disk_{name}"]
        assert rows == [("", ("c", "nbd://a"), value)]
