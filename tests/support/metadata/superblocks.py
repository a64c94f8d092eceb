# SPDX-License-Identifier: Apache-2.0
"""Superblocks of a clone, and the area that they lie in."""

import msgspec

from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, seal
from nbdtarget_metadata.log.superblock import SUPERBLOCK_MAGIC, superblock_block
from nbdtarget_metadata.operations import UNREADABLE

__all__ = [
    "LOST",
    "NEW",
    "OLD",
    "ROT",
    "UUID",
    "ZERO",
    "N",
    "area_of",
    "make_superblock",
    "put",
    "put_all",
    "put_body",
    "spoil",
]

UUID = bytes(range(16))
N = 10  # the generation under way; slot 0
NEW, OLD, ROT, ZERO, LOST = "new", "old", "rot", "zero", "unreadable"


def make_superblock(generation: int, **fields: object) -> CloneSuperblock:
    superblock = CloneSuperblock(
        generation=generation,
        uuid=UUID,
        flags=0,
        compat=0,
        ro_compat=0,
        incompat=0,
        nr_commits=0,
        nr_compactions=0,
        arena_blocks=24,
        arena=0,
        snapshot_block=4,
        snapshot_blocks=0,
        snapshot_digest=UUID,
        journal_blocks=0,
        journal_digest=UUID,
        region_size=4096,
        target_size=1 << 20,
        nr_hydrated=0,
    )
    return msgspec.structs.replace(superblock, **fields)


def put(area: bytearray, slot: int, copy: int, superblock: CloneSuperblock) -> None:
    """Write one copy, wherever its generation belongs."""
    block = superblock_block(slot, copy)
    data, _ = seal(SUPERBLOCK_MAGIC, block, msgspec.msgpack.encode(superblock))
    area[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = data


def spoil(area: bytearray, slot: int, copy: int, how: str) -> None:
    block = superblock_block(slot, copy)
    if how == ZERO:
        area[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = bytes(BLOCK_SIZE)
    elif how == ROT:
        area[block * BLOCK_SIZE + 40] ^= 0xFF
    elif how == LOST:
        area[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = UNREADABLE


def area_of(slot_0: tuple[str, str], slot_1: tuple[str, str]) -> bytearray:
    """Slot 0 has generation N (new) or N - 2 (old), slot 1 has N - 1."""
    area = bytearray(4 * BLOCK_SIZE)
    for slot, states in enumerate((slot_0, slot_1)):
        for copy, state in enumerate(states):
            generation = N - 1 if slot else N if state == NEW else N - 2
            put(area, slot, copy, make_superblock(generation))
            spoil(area, slot, copy, state)
    return area


def put_all(superblock: CloneSuperblock, other: CloneSuperblock) -> bytearray:
    area = bytearray(4 * BLOCK_SIZE)
    for copy in range(2):
        put(area, 0, copy, superblock)
        put(area, 1, copy, other)
    return area


def put_body(body: bytes) -> bytearray:
    area = area_of((OLD, OLD), (OLD, OLD))
    data, _ = seal(SUPERBLOCK_MAGIC, 0, body)
    area[:BLOCK_SIZE] = data
    return area
