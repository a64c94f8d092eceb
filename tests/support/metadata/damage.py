# SPDX-License-Identifier: Apache-2.0
"""Damage to images of metadata: flipped bits, spoiled blocks, and errors that name them."""

import os
import re
from collections.abc import Iterable, Iterator

import pytest

from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, HEADER_SIZE, blocks_for
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS
from tests.support.metadata.clone_workload import rotten

__all__ = [
    "DEEP",
    "NAMES_A_BLOCK",
    "SECTORS",
    "assert_named",
    "bits_to_flip",
    "each_age_and_step",
    "flip",
    "rot",
    "spoiled",
    "superblock_lengths",
]

DEEP = os.environ.get("ROT_DEEP") == "1"
NAMES_A_BLOCK = re.compile(r"blocks? \d+.*: expected .*, found ", re.DOTALL)


SEVENTH = 7  # each one, so that all bits of a byte take their turns


def each_age_and_step(
    ages: Iterable[str], every_bit: Iterable[str]
) -> pytest.MarkDecorator:
    """Parameters `name` and `step`: each seventh bit of all `ages`, and among the long tests all bits of some."""
    return pytest.mark.parametrize(
        ("name", "step"),
        [
            *((name, SEVENTH) for name in ages),
            *(pytest.param(name, 1, marks=pytest.mark.long) for name in every_bit),
        ],
    )


def bits_to_flip(block: int, length: int, step: int) -> range:
    """Bit numbers from the start of the image: each `step`th of an envelope at `block`."""
    begin = block * BLOCK_SIZE
    end = begin + (blocks_for(length) * BLOCK_SIZE if DEEP else length)
    return range(8 * begin + block % step, 8 * end, step)


def flip(image: bytearray, bit: int) -> None:
    image[bit // 8] ^= 1 << bit % 8


def superblock_lengths(image: bytes) -> Iterator[tuple[int, int]]:
    for block in range(SUPERBLOCK_BLOCKS):
        at = block * BLOCK_SIZE
        yield block, HEADER_SIZE + int.from_bytes(image[at + 12 : at + 16], "little")


def spoiled(image: bytes, *blocks: int) -> bytearray:
    """Return the image with one byte in each of these blocks' bodies flipped."""
    rotten = bytearray(image)
    for block in blocks:
        rotten[block * BLOCK_SIZE + HEADER_SIZE + 1] ^= 0x55
    return rotten


def assert_named(error: MetadataError, block: int | None = None) -> None:
    text = str(error)
    assert block is None or f"block {block}" in text
    assert isinstance(error, CorruptMetadata)
    assert NAMES_A_BLOCK.search(text), text
    assert "\n" not in text


SECTORS = BLOCK_SIZE // 512


def rot(image: bytes, *blocks: int) -> bytes:
    for block in blocks:
        image = rotten(image, block * SECTORS)
    return image
