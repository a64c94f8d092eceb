# SPDX-License-Identifier: Apache-2.0
"""The envelope: intact or refused, whatever the bytes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget_metadata.errors import CorruptMetadata, UnsupportedFormat
from nbdtarget_metadata.log import envelope
from nbdtarget_metadata.log.envelope import (
    BLOCK_SIZE,
    FORMAT_VERSION,
    HEADER_SIZE,
    blocks_for,
    open_envelope,
    peek_blocks,
    seal,
)

MAGIC = b"test-mag"


def test_blocks_for_rounds_up() -> None:
    assert [blocks_for(length) for length in (0, 1, 4096, 4097)] == [0, 1, 1, 2]


@pytest.mark.parametrize("length", [0, 1, BLOCK_SIZE - HEADER_SIZE, BLOCK_SIZE])
def test_sealed_body_opens_again_padded_to_blocks(length: int) -> None:
    body = b"x" * length
    data, digest = seal(MAGIC, 7, body)
    assert len(data) % BLOCK_SIZE == 0
    assert peek_blocks(memoryview(data)) == len(data) // BLOCK_SIZE
    opened = open_envelope(MAGIC, 7, memoryview(data), "it")
    assert (bytes(opened.body), opened.digest) == (body, digest)


def test_trailing_garbage_is_not_looked_at() -> None:
    data, _ = seal(MAGIC, 7, b"body")
    garbage = data[: HEADER_SIZE + 4] + b"\xff" * (BLOCK_SIZE - HEADER_SIZE - 4)
    assert open_envelope(MAGIC, 7, memoryview(garbage), "it").body.tobytes() == b"body"


@pytest.mark.parametrize("at", range(HEADER_SIZE + 4))
def test_any_flipped_byte_is_refused(at: int) -> None:
    data = bytearray(seal(MAGIC, 7, b"body")[0])
    data[at] ^= 1
    with pytest.raises(CorruptMetadata, match="of it"):
        open_envelope(MAGIC, 7, memoryview(data), "it")


def test_envelope_at_another_block_is_refused() -> None:
    data, _ = seal(MAGIC, 7, b"body")
    with pytest.raises(CorruptMetadata, match="digest of it"):
        open_envelope(MAGIC, 8, memoryview(data), "it")


def test_intact_envelope_of_a_newer_version_is_unsupported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(envelope, "FORMAT_VERSION", FORMAT_VERSION + 1)
    data, _ = seal(MAGIC, 7, b"body")
    monkeypatch.undo()
    with pytest.raises(UnsupportedFormat) as caught:
        open_envelope(MAGIC, 7, memoryview(data), "it")
    assert caught.value.version == FORMAT_VERSION + 1


@given(st.binary(min_size=HEADER_SIZE, max_size=HEADER_SIZE + 64))
def test_any_bytes_are_refused_with_a_reason(data: bytes) -> None:
    with pytest.raises(CorruptMetadata):
        open_envelope(MAGIC, 0, memoryview(data), "it")
