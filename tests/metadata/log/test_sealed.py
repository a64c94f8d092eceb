# SPDX-License-Identifier: Apache-2.0
"""Metadata that can be written no more, and whose disk may say for good that an orderly stop was the last."""

from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.crash.images import run_over

REGION = 4096
NR_REGIONS = 8


def opened() -> tuple[CloneMetadata, bytearray]:
    """Metadata in use: its last commit was none of a stop."""
    image = bytearray(CloneMetadata.device_size_min(NR_REGIONS))
    metadata = run_over(
        image,
        CloneMetadata.format(
            device_size=len(image),
            region_size=REGION,
            target_size=NR_REGIONS * REGION,
            uuid=b"seal" * 4,
        ),
    )
    metadata.set_hydrated(0, 1)
    commit(metadata, image, clean_shutdown=False)
    return metadata, image


def commit(metadata: CloneMetadata, image: bytearray, *, clean_shutdown: bool) -> None:
    transaction = metadata.pre_commit(clean_shutdown=clean_shutdown)
    assert transaction is not None
    run_over(image, transaction.journal())
    run_over(image, transaction.superblock())
    transaction.done()


def test_commit_that_fails_in_use_seals_nothing() -> None:
    metadata, _ = opened()
    metadata.set_hydrated(1, 2)
    assert metadata.pre_commit() is not None
    metadata.abort()
    assert not metadata.is_sealed


def test_stop_that_is_recorded_seals_what_then_fails() -> None:
    metadata, image = opened()
    commit(metadata, image, clean_shutdown=True)
    assert not metadata.is_sealed
    metadata.set_hydrated(1, 2)
    assert metadata.pre_commit() is not None
    metadata.abort()
    assert metadata.is_sealed


def test_stop_that_fails_may_be_recorded_all_the_same() -> None:
    metadata, _ = opened()
    assert metadata.pre_commit(clean_shutdown=True) is not None
    metadata.abort()
    assert metadata.is_sealed
