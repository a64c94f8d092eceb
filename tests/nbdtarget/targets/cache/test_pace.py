# SPDX-License-Identifier: Apache-2.0
"""How far apart migrations are kept while clients hit."""

from metadata.cache import Statistics
from nbdtarget.targets.cache.pace import HITS_PER_MISS, PAUSE_S, Pace
from tests.support.clock import SimClock

PAUSE_NS = int(PAUSE_S * 1e9)


def pace_after(clock: SimClock, hits: Statistics) -> Pace:
    pace = Pace(clock, hits)
    assert pace.ready_ns <= clock.now_ns()
    return pace


def advance(clock: SimClock, delay_s: float) -> None:
    clock.advance(delay_s)


def test_nobody_hits_so_migrations_follow_each_other_at_once() -> None:
    clock, hits = SimClock(), Statistics()
    pace = pace_after(clock, hits)
    for _ in range(100):
        pace.note_start()
        assert pace.ready_ns <= clock.now_ns()


def test_misses_are_no_hits() -> None:
    clock, hits = SimClock(), Statistics()
    pace = pace_after(clock, hits)
    hits.read_misses = hits.write_misses = 1000
    advance(clock, 1)
    pace.note_start()
    assert pace.ready_ns <= clock.now_ns()


def test_while_clients_hit_there_is_a_pause_after_each_start() -> None:
    clock, hits = SimClock(), Statistics()
    pace = pace_after(clock, hits)
    for name in ("read_hits", "write_hits"):
        setattr(hits, name, getattr(hits, name) + 1)
        advance(clock, 2 * PAUSE_S)
        assert pace.ready_ns <= clock.now_ns(), "the pause has been long enough already"
        pace.note_start()
        assert pace.ready_ns == clock.now_ns() + PAUSE_NS


def test_the_pause_ends_early_when_nobody_hits_any_more() -> None:
    clock, hits = SimClock(), Statistics()
    pace = pace_after(clock, hits)
    hits.read_hits += 1
    advance(clock, 2 * PAUSE_S)
    assert pace.ready_ns <= clock.now_ns()
    advance(clock, 0.9 * PAUSE_S)
    pace.note_start()
    assert pace.ready_ns > clock.now_ns()
    advance(clock, 0.2 * PAUSE_S)  # a look's time has passed, without a hit
    assert pace.ready_ns <= clock.now_ns()


def test_while_misses_are_not_few_there_is_no_pause() -> None:
    clock, hits = SimClock(), Statistics()
    pace = pace_after(clock, hits)
    hits.read_hits, hits.read_misses = HITS_PER_MISS * 7, 7
    advance(clock, 2 * PAUSE_S)
    assert pace.ready_ns <= clock.now_ns()
    pace.note_start()
    assert pace.ready_ns <= clock.now_ns()
    hits.read_hits += HITS_PER_MISS * 3 + 1
    hits.write_misses += 3
    advance(clock, 2 * PAUSE_S)
    assert pace.ready_ns <= clock.now_ns()
    pace.note_start()
    assert pace.ready_ns > clock.now_ns(), "few misses: clients wait for us"
