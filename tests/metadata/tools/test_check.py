# SPDX-License-Identifier: Apache-2.0
"""`check` accepts exactly what `open` accepts; and images of every released format do."""

import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import CorruptMetadata, NotFormatted
from tests.support.metadata.clone_workload import rotten
from tests.support.metadata.report import check
from tests.support.metadata.small_clone import NR_REGIONS, SIZE, UUID, commit, format_on
from tests.support.metadata.store import Store, drive, read_image
from tests.support.places import FIXTURES


def test_report_tells_what_is_there() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    metadata.set_hydrated(0, 10)
    commit(store, metadata, clean=True)
    report = read_image(bytes(store.durable), check(SIZE))
    assert (report.uuid, report.generation, report.nr_commits) == (UUID, 2, 1)
    assert (report.nr_hydrated, report.nr_regions) == (10, NR_REGIONS)
    assert (report.used_blocks, report.nr_compactions) == (5, 0)
    assert report.clean_shutdown
    assert report.warnings == ()


def test_rotten_copy_is_a_warning() -> None:
    store = Store(SIZE)
    format_on(store)
    report = read_image(rotten(bytes(store.durable), 0), check(SIZE))
    assert len(report.warnings) == 1
    assert "slot 0 copy 0 (block 0)" in report.warnings[0]


def test_corruption_is_refused() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    metadata.set_hydrated(0, 10)
    commit(store, metadata)
    with pytest.raises(CorruptMetadata, match="journal record at block 4"):
        read_image(rotten(bytes(store.durable), 4 * 8), check(SIZE))


def test_empty_device_is_not_formatted() -> None:
    with pytest.raises(NotFormatted):
        read_image(bytes(SIZE), check(SIZE))


# Format version 1: a snapshot of runs and of bits, and a journal behind it. The image was
# written once and stays as it is.
V1_REGION_SIZE = 4096
V1_NR_REGIONS = 70_000
V1_HYDRATED = {*range(1000, 3000), *range(5000, 9000, 2), 40_000, 40_002, 69_999}


@pytest.fixture
def v1_image() -> bytes:
    return (FIXTURES / "clone-v1.img").read_bytes()


def test_format_version_1_opens_for_ever(v1_image: bytes) -> None:
    steps = CloneMetadata.open(
        device_size=len(v1_image),
        region_size=V1_REGION_SIZE,
        target_size=V1_NR_REGIONS * V1_REGION_SIZE - 512,
    )
    metadata = read_image(v1_image, steps)
    hydrated = {at for at in range(V1_NR_REGIONS) if metadata.hydrated[at]}
    assert hydrated == V1_HYDRATED
    assert (metadata.generation, metadata.clean_shutdown) == (5, True)
    assert metadata.uuid == bytes(range(16))
    assert metadata.notes == ()


def test_format_version_1_checks_clean(v1_image: bytes) -> None:
    report = read_image(v1_image, check(len(v1_image)))
    assert (report.nr_hydrated, report.nr_compactions) == (len(V1_HYDRATED), 1)
    assert report.warnings == ()


def test_format_version_1_can_be_committed_to(v1_image: bytes) -> None:
    store = Store(len(v1_image), v1_image)
    steps = CloneMetadata.open(
        device_size=len(v1_image),
        region_size=V1_REGION_SIZE,
        target_size=V1_NR_REGIONS * V1_REGION_SIZE - 512,
    )
    metadata = drive(store, steps)
    metadata.set_hydrated(0, 1)
    commit(store, metadata)
    report = drive(store, check(store.size))
    assert (report.generation, report.nr_hydrated) == (6, len(V1_HYDRATED) + 1)
