# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this room."""

import pytest

from nbdtarget_metadata.cache import blocks as cache_blocks
from nbdtarget_metadata.cache import encoding as cache_encoding
from nbdtarget_metadata.cache import records as cache_records
from nbdtarget_metadata.cache import shutdown
from nbdtarget_metadata.clone import encoding, records
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.log import commit
from tests.support.metadata.small_clone import CATCH_UP_RUNS, SIZE, format_on
from tests.support.metadata.store import Store


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of several chunks, though the bitmap is small: 512 regions each.

    And compactions that catch up with what is committed meanwhile, though it is little.
    """
    monkeypatch.setattr(records, "CHUNK_BYTES", 64)
    monkeypatch.setattr(encoding, "CHUNK_REGIONS", 512)
    monkeypatch.setattr(commit, "CATCH_UP_MAX", CATCH_UP_RUNS)


@pytest.fixture
def store() -> Store:
    return Store(SIZE)


@pytest.fixture
def metadata(store: Store) -> CloneMetadata:
    return format_on(store)


@pytest.fixture
def small_cache_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots and clean shutdowns of several records, though the cache is small."""
    for module in (cache_records, shutdown):
        monkeypatch.setattr(module, "CHUNK_BYTES", 128)
    monkeypatch.setattr(cache_records, "ENTRIES_PER_RECORD_MAX", 3)
    monkeypatch.setattr(cache_encoding, "CHUNK_CBLOCKS", 16)
    monkeypatch.setattr(commit, "CATCH_UP_MAX", 2)
    monkeypatch.setattr(cache_blocks, "TAKEN_BACK_MAX", 2)
    monkeypatch.setattr(cache_blocks, "STEP_CBLOCKS", 4)
