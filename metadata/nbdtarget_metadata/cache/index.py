# SPDX-License-Identifier: Apache-2.0
"""Which cache block holds an origin block: a hash table of 5 to 10 bytes a cache block.

Open addressing with linear probing, at most four fifths full. A slot holds a cblock plus one, or zero; what
oblock that is stands in the values (records.py), so an entry must be removed **before**
its value changes. Removing moves later entries of the run forward: there are no tombstones.
"""

from array import array
from typing import Final

from nbdtarget_metadata.cache.records import OBLOCK_SHIFT, Words
from nbdtarget_metadata.operations import Steps

__all__ = ["OblockIndex"]

_MULTIPLIER: Final = 0x9E3779B97F4A7C15  # 2^64 / the golden ratio
_MASK_64: Final = (1 << 64) - 1
STEP_BYTES: Final = 2 << 20


class OblockIndex:
    """Made by `new`. See the module head."""

    def __init__(self, values: Words, slots: Words) -> None:
        self._values = values
        self._slots = slots
        self._mask = len(slots) - 1
        self._shift = 64 - self._mask.bit_length()

    @classmethod
    def new(cls, values: Words) -> Steps["OblockIndex"]:
        """Return an empty index with room for all of `values`."""
        nr_slots = 1 << max(3, _slots_for(len(values)).bit_length())
        slots: Words = array("I")
        missing = nr_slots * slots.itemsize
        while missing:
            size = min(STEP_BYTES, missing)
            slots.frombytes(bytes(size))
            missing -= size
            yield ()
        return cls(values, slots)

    def has_room_for(self, nr_values: int) -> bool:
        """Tell whether so many may be added in all."""
        return _slots_for(nr_values) < len(self._slots)

    def maybe_find(self, oblock: int) -> int | None:
        """Return the cblock that holds `oblock`."""
        slots, values, mask = self._slots, self._values, self._mask
        at = (oblock * _MULTIPLIER & _MASK_64) >> self._shift
        while found := slots[at]:
            if values[found - 1] >> OBLOCK_SHIFT == oblock:
                return found - 1
            at = (at + 1) & mask
        return None

    def add(self, cblock: int) -> int | None:
        """Add `cblock`, whose value is set; or return the one that has its oblock already."""
        # hot: opening calls it for each mapping; 0.4 us.
        slots, values, mask = self._slots, self._values, self._mask
        oblock = values[cblock] >> OBLOCK_SHIFT
        at = (oblock * _MULTIPLIER & _MASK_64) >> self._shift
        while found := slots[at]:
            if values[found - 1] >> OBLOCK_SHIFT == oblock:
                return found - 1
            at = (at + 1) & mask
        slots[at] = cblock + 1
        return None

    def remove(self, cblock: int) -> None:
        """Remove `cblock`, whose value is still set."""
        slots, mask = self._slots, self._mask
        hole = self._home(cblock)
        while slots[hole] != cblock + 1:
            assert slots[hole], "it was added"
            hole = (hole + 1) & mask
        at = hole
        while True:
            at = (at + 1) & mask
            found = slots[at]
            if not found:
                break
            # It may move into the hole unless its home lies behind that (cyclically).
            if (at - self._home(found - 1)) & mask >= (at - hole) & mask:
                slots[hole] = found
                hole = at
        slots[hole] = 0

    def _home(self, cblock: int) -> int:
        oblock = self._values[cblock] >> OBLOCK_SHIFT
        return (oblock * _MULTIPLIER & _MASK_64) >> self._shift


def _slots_for(nr_values: int) -> int:
    return nr_values + nr_values // 4
