# SPDX-License-Identifier: Apache-2.0
"""A small clone on a `Store`, and how to commit it."""

from nbdtarget_metadata.clone.metadata import CloneMetadata, CloneTransaction
from tests.support.metadata.store import Store, drive

REGION_SIZE = 4096
NR_REGIONS = 100
TARGET_SIZE = NR_REGIONS * REGION_SIZE - 512
SIZE = CloneMetadata.device_size_min(NR_REGIONS)
UUID = bytes(range(16))


def format_on(store: Store, *, target_size: int = TARGET_SIZE) -> CloneMetadata:
    steps = CloneMetadata.format(
        device_size=store.size,
        region_size=REGION_SIZE,
        target_size=target_size,
        uuid=UUID,
    )
    return drive(store, steps)


def open_on(
    store: Store, *, region_size: int = REGION_SIZE, target_size: int = TARGET_SIZE
) -> CloneMetadata:
    steps = CloneMetadata.open(
        device_size=store.size, region_size=region_size, target_size=target_size
    )
    return drive(store, steps)


def finish(store: Store, transaction: CloneTransaction | None) -> None:
    assert transaction is not None
    drive(store, transaction.journal())
    drive(store, transaction.superblock())
    transaction.done()


def commit(store: Store, metadata: CloneMetadata, *, clean: bool = False) -> None:
    finish(store, metadata.pre_commit(clean_shutdown=clean))


def fill_journal(store: Store, metadata: CloneMetadata) -> None:
    """Commit single regions until it is time to compact."""
    for region_nr in range(0, NR_REGIONS, 2):
        if metadata.needs_compaction:
            return
        metadata.set_hydrated(region_nr, region_nr + 1)
        commit(store, metadata)
    raise AssertionError("the journal never got full")


CATCH_UP_RUNS = 2
