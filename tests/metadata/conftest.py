# SPDX-License-Identifier: Apache-2.0
"""Fixtures of this room."""

import pytest

from metadata import clone, records
from metadata.clone import CloneMetadata
from tests.metadata.small import SIZE, format_on
from tests.metadata.store import Store


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Snapshots of several chunks, though the bitmap is small: 512 regions each."""
    monkeypatch.setattr(records, "CHUNK_BYTES", 64)
    monkeypatch.setattr(clone, "CHUNK_REGIONS", 512)


@pytest.fixture
def store() -> Store:
    return Store(SIZE)


@pytest.fixture
def metadata(store: Store) -> CloneMetadata:
    return format_on(store)
