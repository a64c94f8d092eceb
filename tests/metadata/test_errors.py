# SPDX-License-Identifier: Apache-2.0
"""Each error says in one line what it carries."""

import pytest

from nbdtarget_metadata.errors import (
    BlockSizeMismatch,
    CannotShrink,
    CorruptMetadata,
    FailedMetadata,
    GeometryMismatch,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    ReadOnlyMetadata,
    UnsupportedFormat,
)

CASES: list[tuple[MetadataError, list[str]]] = [
    (NotFormatted(), ["not formatted"]),
    (NotOurs("byte 1024", "53ef"), ["byte 1024", "53ef", "nbdtarget"]),
    (CorruptMetadata("block 4", 1, 2), ["block 4", "expected 1", "found 2"]),
    (UnsupportedFormat(9, 0), ["version 9"]),
    (UnsupportedFormat(1, 6), ["0x6"]),
    (
        GeometryMismatch("region_size", stored=4096, given=8192),
        ["Region and/or target size don't match the ones in metadata", "4096", "8192"],
    ),
    (
        BlockSizeMismatch(stored=65536, given=98304),
        ["data block size (98304 bytes)", "65536"],
    ),
    (CannotShrink("cache", 7), ["unable to shrink cache; cache block 7 is dirty"]),
    (MetadataTooSmall(needed=10, given=5), ["10", "5"]),
    (ReadOnlyMetadata(), ["read-only"]),
    (FailedMetadata(), ["failed"]),
]


@pytest.mark.parametrize(
    ("error", "words"), CASES, ids=[type(error).__name__ for error, _ in CASES]
)
def test_error_is_one_line_with_its_facts(
    error: MetadataError, words: list[str]
) -> None:
    text = str(error)
    assert "\n" not in text
    assert [word for word in words if word not in text] == []
