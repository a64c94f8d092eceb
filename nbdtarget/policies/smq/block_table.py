# SPDX-License-Identifier: Apache-2.0
"""`BlockTable`: which entry stands for a block of the origin. A chained hash table in flat arrays.

It takes 16 to 20 bytes for each entry and nothing for each block of the origin, so the size of the
origin does not matter. A dict would take about 100 bytes for each entry. An array with one number for
each block of the origin would be 100 ns faster, but would take 2 GiB for an origin of 16 TiB in blocks
of 32 KiB.

`Smq.lookup` contains a copy of `find`, because a call would cost too much there.
"""

from array import array
from typing import Final

__all__ = ["HASH_MASK", "HASH_MULTIPLIER", "NO_ENTRY", "BlockTable"]

# Fibonacci hashing: neighbours, and strides of any power of two, are spread over all buckets.
HASH_MULTIPLIER: Final = 0x9E3779B1
HASH_MASK: Final = 0xFFFFFFFF

NO_ENTRY: Final = 0xFFFFFFFF  # ends a chain


class BlockTable:
    """The table of one set of entries.

    Attributes:
        blocks: the block of each entry. For an entry that is not inserted, the number means nothing.
        shift, buckets, chain: the hash table.
    """

    def __init__(self, nr_entries: int) -> None:
        bits = max((nr_entries - 1).bit_length(), 1)
        self.blocks = array("Q", [0]) * nr_entries
        self.shift = 32 - bits
        self.buckets = array("I", [NO_ENTRY]) * (1 << bits)
        self.chain = array("I", [NO_ENTRY]) * nr_entries

    def find(self, block: int) -> int:
        """Return the entry that was inserted for `block`, or -1."""
        blocks, chain = self.blocks, self.chain
        entry = self.buckets[(block * HASH_MULTIPLIER & HASH_MASK) >> self.shift]
        while entry != NO_ENTRY:
            if blocks[entry] == block:
                return entry
            entry = chain[entry]
        return -1

    def insert(self, entry: int, block: int) -> None:
        """Let `entry` stand for `block`. Neither may be in the table."""
        bucket = (block * HASH_MULTIPLIER & HASH_MASK) >> self.shift
        self.blocks[entry] = block
        self.chain[entry] = self.buckets[bucket]
        self.buckets[bucket] = entry

    def remove(self, entry: int) -> None:
        """Forget the block of `entry`, which must be in the table."""
        bucket = (self.blocks[entry] * HASH_MULTIPLIER & HASH_MASK) >> self.shift
        at = self.buckets[bucket]
        if at == entry:
            self.buckets[bucket] = self.chain[entry]
            return
        while self.chain[at] != entry:
            at = self.chain[at]
            assert at != NO_ENTRY, f"entry {entry} is not in the table"
        self.chain[at] = self.chain[entry]
