# SPDX-License-Identifier: Apache-2.0
"""A million cache blocks: memory, and how much one call does, in moves and not in seconds."""

import tracemalloc

import pytest

from nbdtarget.policies.smq.multi_level_queue import MultiLevelQueue
from nbdtarget.policies.smq.policy import MOVES_MAX, Smq
from tests.support.small_smq import BLOCK, S

MILLION = 1 << 20
ORIGIN_SIZE = 8 * MILLION * BLOCK


def test_memory_is_under_64_bytes_a_cache_block_and_none_an_origin_block() -> None:
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        smq = Smq(MILLION, origin_size=ORIGIN_SIZE, block_size=BLOCK, now_ns=0)
        empty = tracemalloc.get_traced_memory()[0] - before
        for cblock in range(5000):
            smq.load_mapping(cblock, cblock * 1667, False, None)
        used = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert empty < 40 * MILLION
    # Blocks that are in use take no more than those that are not.
    assert used - empty < 5000


@pytest.mark.slow
def test_no_call_moves_more_than_its_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    # A fresh cache without hints is the worst: everything is in the wrong level.
    nr_cblocks = 1 << 16
    smq = Smq(nr_cblocks, origin_size=ORIGIN_SIZE, block_size=BLOCK, now_ns=0)
    for cblock in range(nr_cblocks):
        smq.load_mapping(cblock, cblock * 7, cblock % 3 == 0, 0)
    moves: list[int] = []
    remove = MultiLevelQueue.remove

    def counted(queue: MultiLevelQueue, entry: int) -> None:
        moves[-1] += 1
        remove(queue, entry)

    monkeypatch.setattr(MultiLevelQueue, "remove", counted)
    moves.append(0)
    more = smq.tick(S)
    while more:
        moves.append(0)
        more = smq.catch_up()
    assert max(moves) <= MOVES_MAX
    # Each block is picked up and put down once, however far it has to go.
    assert len(moves) <= 2 * nr_cblocks // MOVES_MAX + 2
    hints = [smq.get_hint(cblock) for cblock in range(nr_cblocks)]
    counts = [hints.count(level) for level in range(64)]
    assert max(counts) - min(counts) <= 2
