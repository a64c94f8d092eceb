# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this room."""

import pytest

from nbdtarget_metadata.cache import blocks as cache_blocks
from nbdtarget_metadata.cache import records as cache_records
from nbdtarget_metadata.cache import transaction as cache_transaction
from nbdtarget_metadata.clone import metadata as clone
from nbdtarget_metadata.clone import records, transaction
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.metadata.small_clone import CATCH_UP_RUNS, SIZE, format_on
from tests.support.metadata.store import Store


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of several chunks, though the bitmap is small: 512 regions each.

    And compactions that catch up with what is committed meanwhile, though it is little.
    """
    monkeypatch.setattr(records, "CHUNK_BYTES", 64)
    monkeypatch.setattr(clone, "CHUNK_REGIONS", 512)
    monkeypatch.setattr(transaction, "CATCH_UP_RUNS_MAX", CATCH_UP_RUNS)


@pytest.fixture
def store() -> Store:
    return Store(SIZE)


@pytest.fixture
def metadata(store: Store) -> CloneMetadata:
    return format_on(store)


@pytest.fixture
def small_cache_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and clean shutdowns of several records, though the cache is small."""
    for module in (cache_records, cache_transaction):
        monkeypatch.setattr(module, "CHUNK_BYTES", 128)
    monkeypatch.setattr(cache_records, "ENTRIES_PER_RECORD_MAX", 3)
    monkeypatch.setattr(cache_transaction, "CHUNK_CBLOCKS", 16)
    monkeypatch.setattr(cache_transaction, "CATCH_UP_MAX", 2)
    monkeypatch.setattr(cache_blocks, "TAKEN_BACK_MAX", 2)
    monkeypatch.setattr(cache_blocks, "STEP_CBLOCKS", 4)
