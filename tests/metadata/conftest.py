# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this room."""

import pytest

from metadata import clone, records, transaction
from metadata.clone import CloneMetadata
from tests.metadata.small import SIZE, format_on
from tests.metadata.store import Store

CATCH_UP_RUNS = 2


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
