# SPDX-License-Identifier: Apache-2.0
"""Look at every block of an arena, whether or not a superblock vouches for it. For offline tools.

`read_chain` follows a chain and stops where it breaks; a scan goes on. What it meets:

    intact   a record whose envelope is as it was written, at this very block
    zero     a block of zeroes
    noise    anything else: rot, or what is left of a record that was overwritten in part

Noise is searched block by block, so an intact record behind it is found.
"""

from collections.abc import Callable
from typing import Final, Generic, NamedTuple

from nbdtarget_metadata.errors import CorruptMetadata, UnsupportedFormat
from nbdtarget_metadata.log.chain import READ_BLOCKS, RECORD_MAGIC, R
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, open_envelope, peek_blocks
from nbdtarget_metadata.operations import Steps, read

__all__ = ["Placed", "pass_over", "scan"]

# A record fits into half of it, so no block is read much more than twice.
WINDOW_BLOCKS: Final = 2 * READ_BLOCKS

_ZERO_BLOCK: Final = bytes(BLOCK_SIZE)


class Placed(NamedTuple, Generic[R]):
    """An intact record, and where: blocks [block, end)."""

    block: int
    end: int
    digest: bytes
    record: R


def scan(
    begin: int,
    end: int,
    *,
    decode: Callable[[memoryview, str], R],
    intact: Callable[[Placed[R]], None],
    other: Callable[[int, bool], None],
) -> Steps[None]:
    """Call `intact` with each intact record in blocks [begin, end), in order.

    `other` is called with each block outside of them, and whether it is all zero. `decode` raises
    CorruptMetadata for a record of another kind.
    """
    block = begin
    while block < end:
        blocks = min(WINDOW_BLOCKS, end - block)
        window = yield from read(block * BLOCK_SIZE, blocks * BLOCK_SIZE)
        at = 0
        while at < blocks:
            # A record may begin here that does not fit: look again from here.
            if at and blocks - at < READ_BLOCKS and block + blocks < end:
                break
            data = window[at * BLOCK_SIZE : (at + READ_BLOCKS) * BLOCK_SIZE]
            placed = _maybe_record(block + at, data, decode)
            if placed is None:
                other(block + at, bytes(data[:BLOCK_SIZE]) == _ZERO_BLOCK)
                at += 1
            else:
                intact(placed)
                at = placed.end - block
                yield ()
        block += at


def _maybe_record(
    block: int, data: memoryview, decode: Callable[[memoryview, str], R]
) -> Placed[R] | None:
    if bytes(data[: len(RECORD_MAGIC)]) != RECORD_MAGIC:
        return None
    where = f"record at block {block}"
    try:
        opened = open_envelope(RECORD_MAGIC, block, data, where)
        record = decode(opened.body, where)
    except (CorruptMetadata, UnsupportedFormat):
        return None
    return Placed(block, block + peek_blocks(data), opened.digest, record)


def pass_over(block: int, is_zero: bool) -> None:
    """Take no note of a block without an intact record: an `other` for `scan`."""
