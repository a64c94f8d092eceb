# SPDX-License-Identifier: Apache-2.0
"""A scan finds every intact record, wherever it stands, and goes on behind what is broken."""

import pytest

from nbdtarget_metadata.clone.records import (
    Record,
    append_content,
    decode_record,
    new_runs,
)
from nbdtarget_metadata.log.chain import READ_BLOCKS, Chain
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.scan import WINDOW_BLOCKS, Placed, scan
from tests.support.metadata.store import read_image

NR_BLOCKS = 3 * WINDOW_BLOCKS


class Scene:
    """An area of blocks, and what a scan of it told."""

    def __init__(self) -> None:
        self.image = bytearray(NR_BLOCKS * BLOCK_SIZE)
        self.intact: list[tuple[int, int]] = []
        self.noise: list[int] = []
        self.nr_zero = 0

    def put(self, block: int, blocks: int) -> None:
        """Put a record of so many blocks."""
        chain = Chain(block=block, end=NR_BLOCKS, digest=bytes(16))
        bits = bytes([1]) * ((blocks - 1) * BLOCK_SIZE + 9)
        write = append_content(chain, 1, (0, bits))
        assert chain.block == block + blocks
        self.image[write.offset : write.offset + len(write.data)] = write.data

    def scan(self, begin: int = 0, end: int = NR_BLOCKS) -> None:
        def other(block: int, is_zero: bool) -> None:
            self.nr_zero += is_zero
            if not is_zero:
                self.noise.append(block)

        def intact(placed: Placed[Record]) -> None:
            self.intact.append((placed.block, placed.end))

        steps = scan(begin, end, decode=decode_record, intact=intact, other=other)
        read_image(bytes(self.image), steps)


@pytest.mark.parametrize("blocks", [1, 2, READ_BLOCKS])
@pytest.mark.parametrize("shift", [-READ_BLOCKS, -READ_BLOCKS + 1, -60, -1, 0, 1])
def test_record_across_the_end_of_a_window_is_found(shift: int, blocks: int) -> None:
    scene = Scene()
    begin = WINDOW_BLOCKS + shift
    scene.put(begin, blocks)
    scene.put(begin + blocks, 3)
    scene.scan()
    assert scene.intact == [
        (begin, begin + blocks),
        (begin + blocks, begin + blocks + 3),
    ]
    assert (scene.noise, scene.nr_zero) == ([], NR_BLOCKS - blocks - 3)


def test_record_behind_a_broken_one_is_found() -> None:
    scene = Scene()
    scene.put(5, 4)
    scene.put(9, 1)
    scene.image[6 * BLOCK_SIZE] ^= 1
    scene.scan()
    assert (scene.intact, scene.noise) == ([(9, 10)], [5, 6, 7, 8])


def test_record_that_claims_more_than_there_is_is_noise() -> None:
    scene = Scene()
    scene.put(NR_BLOCKS - 4, 4)
    scene.scan(0, NR_BLOCKS - 1)
    assert scene.intact == []
    assert scene.noise == [NR_BLOCKS - 4, NR_BLOCKS - 3, NR_BLOCKS - 2]


def test_record_at_another_block_is_noise() -> None:
    scene = Scene()
    scene.put(7, 1)
    moved = scene.image[7 * BLOCK_SIZE : 8 * BLOCK_SIZE]
    scene.image[30 * BLOCK_SIZE : 31 * BLOCK_SIZE] = moved
    scene.scan()
    assert (scene.intact, scene.noise) == ([(7, 8)], [30])


def test_intact_envelope_around_no_record_is_noise() -> None:
    scene = Scene()
    chain = Chain(block=7, end=NR_BLOCKS, digest=bytes(16))
    write = append_content(chain, 1, new_runs())
    scene.image[write.offset : write.offset + len(write.data)] = write.data
    scene.scan(7, 9)
    assert scene.intact == [(7, 8)]  # no runs is `apply_record`'s business
