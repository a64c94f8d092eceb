# SPDX-License-Identifier: Apache-2.0
"""How migrations are done in bursts with pauses while clients hit."""

from nbdtarget.targets.cache.throttle import (
    BURST,
    HITS_PER_MISS,
    LOOK_S,
    PERIOD_S,
    Throttle,
)
from nbdtarget_metadata.cache.metadata import Statistics
from tests.support.clock import SimClock


class World:
    def __init__(self) -> None:
        self.clock = SimClock()
        self.seen = Statistics()
        self.throttle = Throttle(self.clock, self.seen)
        assert self.is_ready()

    def is_ready(self) -> bool:
        return self.throttle.ready_ns <= self.clock.now_ns()

    def start_all(self, nr_max: int) -> int:
        """Start what may be started now; return how many that were."""
        nr = 0
        while nr < nr_max and self.is_ready():
            self.throttle.note_start()
            nr += 1
        return nr


def test_migrations_follow_each_other_at_once_while_there_are_no_hits() -> None:
    assert World().start_all(100) == 100


def test_misses_are_no_hits() -> None:
    world = World()
    world.seen.read_misses = world.seen.write_misses = 1000
    world.clock.advance(1)
    assert world.start_all(100) == 100


def test_while_clients_hit_there_is_one_burst_a_period() -> None:
    world = World()
    started = []
    for nr in range(60):
        world.seen.read_hits += 1
        world.seen.write_hits += nr % 2
        world.clock.advance(LOOK_S)
        started.append(world.start_all(100))
    bursts = [nr for nr in started if nr]
    assert set(bursts) == {BURST}
    assert len(bursts) in range(5, 8), "60 looks are six periods"


def test_the_pause_ends_at_the_period_s_end() -> None:
    world = World()
    world.seen.read_hits += 1
    world.clock.advance(PERIOD_S)
    assert world.start_all(100) == BURST
    ready_ns = world.throttle.ready_ns
    assert ready_ns == world.clock.now_ns() + int(PERIOD_S * 1e9)


def test_the_pause_ends_early_when_hits_stop() -> None:
    world = World()
    world.seen.read_hits += 1
    world.clock.advance(PERIOD_S)
    assert world.start_all(100) == BURST
    world.clock.advance(LOOK_S)  # a look's time has passed, without a hit
    assert world.start_all(100) == 100


def test_while_misses_are_not_few_there_is_no_pause() -> None:
    world = World()
    world.seen.read_hits, world.seen.read_misses = HITS_PER_MISS * 7, 7
    world.clock.advance(PERIOD_S)
    assert world.start_all(100) == 100
    world.seen.read_hits += HITS_PER_MISS * 3 + 1
    world.seen.write_misses += 3
    world.clock.advance(PERIOD_S)
    assert world.start_all(100) == BURST, "few misses: clients wait for us"
