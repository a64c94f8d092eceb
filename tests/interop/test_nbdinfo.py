# SPDX-License-Identifier: Apache-2.0
"""A clone, looked at with libnbd's nbdinfo."""

from itertools import pairwise

import pytest

from tests.support.clients import CloneUnderTest, client, needs, report
from tests.support.processes import ServerProcess

pytestmark = [pytest.mark.interop, needs("nbdinfo")]

ZERO = 2  # base:allocation
HYDRATION = "x-nbdtarget:hydration"
HYDRATED, NOT_HYDRATED = 0, 1
REGION = 64 << 10


def test_nbdinfo_sees_size_and_abilities(shared: CloneUnderTest) -> None:
    seen = report("nbdinfo", "--json", shared.uri)
    assert seen["protocol"] == "newstyle-fixed"
    assert seen["structured"]
    (export,) = seen["exports"]
    assert export["export-name"] == shared.name
    assert export["export-size"] == len(shared.content)
    assert export["contexts"] == ["base:allocation", HYDRATION]
    assert not export["is_read_only"]
    able = {key for key in export if key.startswith("can_") and export[key]}
    assert able >= {"can_flush", "can_fua", "can_trim", "can_zero", "can_df"}
    assert able >= {"can_cache", "can_multi_conn"}


def test_nbdinfo_lists_the_export(shared: CloneUnderTest) -> None:
    bare = f"nbd+unix:///?socket={shared.socket}"
    seen = report("nbdinfo", "--list", "--json", bare)
    assert [export["export-name"] for export in seen["exports"]] == [shared.name]


def test_empty_name_is_the_only_export(shared: CloneUnderTest) -> None:
    size = client("nbdinfo", "--size", f"nbd+unix:///?socket={shared.socket}")
    assert int(size) == len(shared.content)


def test_unknown_export_is_refused(shared: CloneUnderTest) -> None:
    bad = f"nbd+unix:///nobody?socket={shared.socket}"
    said = client("nbdinfo", "--size", bad, status=1)
    assert "nobody" in said or "export" in said


def test_map_covers_the_disk_and_calls_zero_only_what_is(
    shared: CloneUnderTest,
) -> None:
    extents = report("nbdinfo", "--map", "--json", shared.uri)
    ends = [extent["offset"] + extent["length"] for extent in extents]
    assert [0, *ends[:-1]] == [extent["offset"] for extent in extents]
    assert ends[-1] == len(shared.content)
    assert all(one["type"] != two["type"] for one, two in pairwise(extents))
    for extent in extents:
        if extent["type"] & ZERO:
            part = shared.content[extent["offset"] :][: extent["length"]]
            assert not any(part)


def test_map_shows_the_hole_of_the_source(shared: CloneUnderTest) -> None:
    extents = report("nbdinfo", "--map", "--json", shared.uri)
    holes = [extent for extent in extents if extent["type"] & ZERO]
    assert sum(extent["length"] for extent in holes) >= 2 << 20


def hydration(uri: str) -> list[tuple[int, int]]:
    """Return (bytes, flags) of each extent that nbdinfo shows."""
    extents = report("nbdinfo", f"--map={HYDRATION}", "--json", uri)
    return [(extent["length"], extent["type"]) for extent in extents]


@needs("qemu-io")
def test_map_shows_what_is_hydrated(
    clone: CloneUnderTest, served_unhydrated: ServerProcess
) -> None:
    size = len(clone.content)
    assert hydration(clone.uri) == [(size, NOT_HYDRATED)]
    write = ["-c", f"write {REGION} {2 * REGION}", "-c", f"write {size - 512} 512"]
    client("qemu-io", "--format", "raw", *write, clone.uri)
    assert hydration(clone.uri) == [
        (REGION, NOT_HYDRATED),
        (2 * REGION, HYDRATED),
        (size - 4 * REGION, NOT_HYDRATED),
        (REGION, HYDRATED),
    ]


def test_map_of_a_hydrated_clone_is_hydrated(clone: CloneUnderTest) -> None:
    clone.hydrate()
    with clone.serve():
        assert hydration(clone.uri) == [(len(clone.content), HYDRATED)]


def test_list_shows_the_contexts(shared: CloneUnderTest) -> None:
    bare = f"nbd+unix:///?socket={shared.socket}"
    (export,) = report("nbdinfo", "--list", "--json", bare)["exports"]
    assert export["contexts"] == ["base:allocation", HYDRATION]


def test_unknown_context_is_refused_by_name(shared: CloneUnderTest) -> None:
    said = client("nbdinfo", "--map=x-nbdtarget:nobody", shared.uri, status=1)
    assert "x-nbdtarget:nobody" in said
