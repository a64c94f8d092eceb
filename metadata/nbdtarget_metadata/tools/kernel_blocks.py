# SPDX-License-Identifier: Apache-2.0
"""Blocks of the kernel's own metadata (persistent-data): checksums, B-trees, arrays and bitsets.

A device is a row of 4 KiB blocks. Each begins with a checksum, and says its own number, so a block that was
misplaced or half written is noticed. Everything is little endian.

    B-tree node    u32 checksum, u32 flags (1: internal, 2: leaf), u64 block number, u32 entries,
                   u32 entries at most, u32 bytes of a value, 4 bytes unused; then all keys (u64), then all values
    array block    u32 checksum, u32 entries at most, u32 entries, u32 bytes of a value, u64 block number;
                   then the values
    array          a B-tree: key i, from 0 without a gap, leads to the i-th array block (u64)
    bitset         an array of u64; bit n is bit n % 64 of the word n // 64

Nothing is overwritten in place but the superblock, and that last: so what an intact superblock leads to is
whole and of one time, however the kernel stopped. We only ever read.

Source: the format as Linux documents and writes it (drivers/md/persistent-data, 6.1 and 6.12), tried on
metadata that those kernels wrote (tests/metadata/kernel_metadata).
"""

from collections.abc import Callable, Iterator
from struct import Struct, unpack_from
from typing import Final

from bitarray import bitarray

from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.operations import Steps, read

__all__ = ["BLOCK_SIZE", "read_array", "read_bitset", "read_block"]

BLOCK_SIZE: Final = 4096

# The checksum of each type of block is XORed with one of these numbers.
_NODE_XOR: Final = 121107
_ARRAY_XOR: Final = 595846735

_NODE: Final = Struct("<IIQIII4x")
_NODE_INTERNAL: Final = 1
_NODE_LEAF: Final = 2
_ARRAY: Final = Struct("<IIIIQ")
_WORD_BITS: Final = 64
_LOCATION_SIZE: Final = (
    8  # a block number, as internal nodes and arrays' leaves hold them
)
# Sixteen levels of two entries each lead to more blocks than a device may have.
_DEPTH_MAX: Final = 16

_CRC32C_POLYNOMIAL: Final = 0x82F63B78  # Castagnoli's, reflected


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = value >> 1 ^ (_CRC32C_POLYNOMIAL if value & 1 else 0)
        table.append(value)
    return table


_TABLE: Final = _crc32c_table()


def checksum(block: bytes | memoryview, xor: int) -> int:
    """Return what the first four bytes of `block` should say: CRC-32C of the rest, XORed.

    0.3 ms a block: the metadata of a cache of a million blocks is read in a second or two.
    """
    crc = 0xFFFFFFFF
    table = _TABLE
    for byte in block[4:]:
        crc = table[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc ^ xor


def read_block(
    block_nr: int, device_size: int, what: str, *, xor: int, number_at: int
) -> Steps[memoryview]:
    """Read a block, and verify its checksum and the number that it gives itself.

    Args:
        what: for errors, "superblock" for example.
        xor: of this type of block.
        number_at: where the block says its number, a u64.
    Raises: CorruptMetadata.
    """
    if (block_nr + 1) * BLOCK_SIZE > device_size:
        raise CorruptMetadata(
            f"the place of {what}",
            f"a block before {device_size // BLOCK_SIZE}",
            block_nr,
        )
    block = yield from read(block_nr * BLOCK_SIZE, BLOCK_SIZE)
    (stored,) = unpack_from("<I", block)
    computed = checksum(block, xor)
    if stored != computed:
        raise CorruptMetadata(
            f"checksum of {what} in block {block_nr}", f"{computed:#x}", f"{stored:#x}"
        )
    (number,) = unpack_from("<Q", block, number_at)
    if number != block_nr:
        raise CorruptMetadata(f"own number of {what}", block_nr, number)
    return block


def read_array(
    root: int,
    device_size: int,
    what: str,
    *,
    value_size: int,
    nr_entries: int,
    take: Callable[[memoryview], None],
) -> Steps[None]:
    """Read the first `nr_entries` entries of an array: `take` is given them, packed, piece by piece.

    Raises: CorruptMetadata: also if there are fewer.
    """
    left = nr_entries
    locations = _Locations(root, device_size, what)
    while left:
        location = yield from locations.next()
        if location is None:
            raise CorruptMetadata(f"entries of {what}", nr_entries, nr_entries - left)
        block = yield from read_block(
            location, device_size, f"{what} (array)", xor=_ARRAY_XOR, number_at=16
        )
        _, entries_max, entries, size, _ = _ARRAY.unpack_from(block)
        if size != value_size or not 0 < entries <= entries_max:
            raise CorruptMetadata(
                f"array block {location} of {what}",
                f"entries of {value_size} bytes",
                f"{entries} of {size} bytes",
            )
        end = _ARRAY.size + entries * value_size
        if end > BLOCK_SIZE:
            raise CorruptMetadata(
                f"entries in array block {location} of {what}",
                f"at most {(BLOCK_SIZE - _ARRAY.size) // value_size}",
                entries,
            )
        taken = min(entries, left)
        take(block[_ARRAY.size : _ARRAY.size + taken * value_size])
        left -= taken


def read_bitset(
    root: int, device_size: int, what: str, *, nr_bits: int
) -> Steps[bitarray]:
    """Read the first `nr_bits` bits of a bitset. Raises: CorruptMetadata."""
    bits = bitarray(endian="little")
    yield from read_array(
        root,
        device_size,
        what,
        value_size=_WORD_BITS // 8,
        nr_entries=-(-nr_bits // _WORD_BITS),
        take=lambda words: bits.frombytes(words.tobytes()),
    )
    del bits[nr_bits:]
    return bits


class _Locations:
    """The blocks of an array, in order: a walk through its B-tree, one leaf at a time."""

    def __init__(self, root: int, device_size: int, what: str) -> None:
        self._device_size = device_size
        self._what = what
        self._waiting = [(root, 1)]  # nodes that are still to be read, and their depth
        self._leaf: Iterator[int] = iter(())
        self._next_key = 0

    def next(self) -> Steps[int | None]:
        """Return the next array block's number; None behind the last. Raises: CorruptMetadata."""
        while True:
            location = next(self._leaf, None)
            if location is not None or not self._waiting:
                return location
            yield from self._read_node()

    def _read_node(self) -> Steps[None]:
        block_nr, depth = self._waiting.pop()
        what = self._what
        block = yield from read_block(
            block_nr, self._device_size, f"{what} (tree)", xor=_NODE_XOR, number_at=8
        )
        _, flags, _, entries, entries_max, size = _NODE.unpack_from(block)
        values_at = _NODE.size + 8 * entries_max
        if (
            flags not in (_NODE_INTERNAL, _NODE_LEAF)
            or size != _LOCATION_SIZE
            or entries > entries_max
            or values_at + 8 * entries > BLOCK_SIZE
            or depth > _DEPTH_MAX
            or (flags == _NODE_INTERNAL and not entries)
        ):
            raise CorruptMetadata(
                f"tree node {block_nr} of {what}",
                "flags 1 or 2, values of 8 bytes, entries that fit",
                f"flags {flags}, values of {size} bytes, {entries} of {entries_max}"
                f" entries, level {depth}",
            )
        values = unpack_from(f"<{entries}Q", block, values_at)
        if flags == _NODE_INTERNAL:
            # The first child is read first: it goes to the end, where `pop` takes from.
            self._waiting += [(child, depth + 1) for child in reversed(values)]
            return
        keys = unpack_from(f"<{entries}Q", block, _NODE.size)
        expected = tuple(range(self._next_key, self._next_key + entries))
        if keys != expected:
            raise CorruptMetadata(
                f"keys in tree node {block_nr} of {what}",
                f"{entries} from {self._next_key} on",
                f"{keys[0]} to {keys[-1]}",
            )
        self._next_key += entries
        self._leaf = iter(values)
