# SPDX-License-Identifier: Apache-2.0
"""The window of the source's zeroes."""

import errno as errnos

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO, Device, Extent
from nbdtarget.targets.clone.holes import EXTENTS_MAX, WINDOW_BYTES_MAX, Holes

K = 1024


class Described(Device):
    """Answers `extents` from a list, and counts."""

    def __init__(self, extents: list[Extent]) -> None:
        super().__init__("described", sum(extent.length for extent in extents))
        self.described = extents
        self.asked: list[tuple[int, int]] = []

    async def extents(self, offset: int, length: int) -> list[Extent]:
        self.asked.append((offset, length))
        found, at = [], 0
        for extent in self.described:
            low, high = max(at, offset), min(at + extent.length, offset + length)
            if low < high:
                found.append(Extent(high - low, extent.flags))
            at += extent.length
        return found


def holes_of(*extents: tuple[int, int]) -> Holes:
    device = Described([Extent(*extent) for extent in extents])
    return Holes(device, length=device.size, region_size=4 * K)


async def test_zeroes_are_found_and_short_ones_are_data() -> None:
    holes = holes_of(
        (100 * K, EXTENT_DATA),
        (60 * K, EXTENT_ZERO),
        (4 * K, EXTENT_DATA),
        (40 * K, EXTENT_ZERO),
        (40 * K, EXTENT_ZERO | EXTENT_HOLE),
        (K, EXTENT_HOLE),
    )
    await holes.look(0)
    assert holes.pieces(0, 245 * K) == [
        (0, 164 * K, False),
        (164 * K, 244 * K, True),
        (244 * K, 245 * K, False),
    ]
    assert holes.zero_until(164 * K) == 244 * K
    assert holes.zero_until(0) == 0


async def test_window_is_asked_for_once_and_then_the_next() -> None:
    holes = holes_of((3 * WINDOW_BYTES_MAX, EXTENT_ZERO))
    for at in (0, K, WINDOW_BYTES_MAX - K, WINDOW_BYTES_MAX):
        await holes.look(at)
        assert holes.covers(at)
    assert isinstance(holes.source, Described)
    assert [length for _, length in holes.source.asked] == [WINDOW_BYTES_MAX] * 2


async def test_what_lies_beyond_the_window_is_data() -> None:
    holes = holes_of((2 * WINDOW_BYTES_MAX, EXTENT_ZERO))
    await holes.look(0)
    assert holes.pieces(WINDOW_BYTES_MAX - K, WINDOW_BYTES_MAX + K) == [
        (WINDOW_BYTES_MAX - K, WINDOW_BYTES_MAX, True),
        (WINDOW_BYTES_MAX, WINDOW_BYTES_MAX + K, False),
    ]


async def test_window_shrinks_where_the_source_is_in_pieces() -> None:
    piece = 64 * K
    nr = 4 * EXTENTS_MAX
    holes = holes_of(
        *((piece, EXTENT_ZERO if at % 2 else EXTENT_DATA) for at in range(nr))
    )
    await holes.look(0)
    assert holes.covers(EXTENTS_MAX * piece - 1)
    assert not holes.covers(EXTENTS_MAX * piece)
    await holes.look(EXTENTS_MAX * piece)
    assert holes.zero_until((EXTENTS_MAX + 1) * piece) == (EXTENTS_MAX + 2) * piece


async def test_source_that_can_not_say_is_data() -> None:
    class Mute(Device):
        async def extents(self, offset: int, length: int) -> list[Extent]:
            raise DeviceError(errnos.EIO, "mute", "extents", offset, length)

    holes = Holes(Mute("mute", 100 * K), length=100 * K, region_size=4 * K)
    await holes.look(0)
    assert holes.pieces(0, 8 * K) == [(0, 8 * K, False)]
