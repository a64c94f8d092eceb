# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache` at a terminal: what Ctrl-C does. The job itself: tests/nbdtarget/control/test_uncache.py."""

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.control import messages as m
from nbdtarget.control import uncache
from nbdtarget.control.uncache import Draining
from tests.support.uncaching import SIZE, World


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr(uncache, "POLL_S", 0.01)
    monkeypatch.setattr(uncache, "STUCK_S", 0.2)
    world = World(tmp_path)
    yield world
    await world.registry.close()


async def test_ctrl_c_leaves_a_cleaner_and_the_next_run_continues(world: World) -> None:
    features = "5 writeback metadata2 no_discard_passdown dirty_log sorted_writeback"
    await world.create(f"128 {features} smq 2 migration_threshold 0", nr_dirty=3)
    await world.disk.message(0, ("migration_rate", "100"))
    world.opener.faults["origin"].ops = frozenset({OP_WRITE})
    world.opener.faults["origin"].fail_at = 0

    def stop(now: Draining) -> None:
        if now.errors:
            world.recorder.on_draining = lambda _: None
            os.kill(os.getpid(), signal.SIGINT)

    world.recorder.on_draining = stop
    assert await world.uncache() == 130
    assert [end for end, _ in world.recorder.ends] == ["interrupted"]
    assert world.recorder.left is not None
    assert world.recorder.left.dirty_blocks == 3
    features = features.replace("writeback", "writethrough", 1)
    words = f"128 {features} cleaner 4 migration_threshold 1024 migration_rate 100"
    assert world.line == world.table(words)
    # Clients are served as before.
    assert await world.disk.read(0, SIZE) == world.content

    await world.disk.message(0, ("migration_rate", "0"))
    world.opener.faults["origin"].clear()
    world.recorder.ends.clear()
    world.recorder.on_draining = lambda _: None
    assert await world.uncache() == 0
    world.check_uncached()


async def test_ctrl_c_before_anything_is_changed(world: World) -> None:
    await world.create(nr_dirty=3)
    before = world.line

    def stop(verb: str, request: m.Request) -> None:
        if verb == "info":
            os.kill(os.getpid(), signal.SIGINT)

    world.before_verb = stop
    assert await world.uncache() == 130
    assert world.recorder.ends == [("interrupted", None)]
    assert world.line == before
