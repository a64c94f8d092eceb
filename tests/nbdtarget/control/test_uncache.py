# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache`: a cache is written back and removed, with real files and the server's own verbs."""

import asyncio
import errno as errnos
import os
import random
import threading
from collections.abc import AsyncIterator
from contextlib import suppress
from pathlib import Path

import pytest

from nbdtarget.bio import OP_FLUSH, OP_WRITE
from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.control import messages as m
from nbdtarget.control import uncache
from nbdtarget.dm.mapped_device import State
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.linear import LinearTarget
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    NEEDS_CHECK,
)
from tests.support.patience import PATIENCE_S
from tests.support.uncaching import BLOCK, NR_SECTORS, SIZE, WRITEBACK, World


@pytest.fixture
async def world(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[World]:
    monkeypatch.setattr(uncache, "POLL_S", 0.01)
    monkeypatch.setattr(uncache, "STUCK_S", 0.2)
    world = World(tmp_path)
    yield world
    await world.registry.close()


# ---- home and away ----


async def test_dirty_blocks_are_written_back_and_none_is_left(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncache, "STUCK_S", PATIENCE_S)
    await world.create(nr_dirty=5)
    assert (world.directory / "origin").read_bytes() != world.content
    assert await world.uncache() == 0
    world.check_uncached()
    assert world.recorder.drained[-1].dirty_blocks == 0
    assert not world.recorder.stucks
    known = await world.superblock()
    assert (known.nr_mapped, known.nr_dirty) == (0, 0)
    assert known.flags & CLEAN_SHUTDOWN


@pytest.mark.parametrize("mode", ["writethrough", "passthrough"])
async def test_clean_cache_is_removed_at_once(world: World, mode: str) -> None:
    await world.create(f"128 1 {mode} smq 0")
    assert await world.uncache() == 0
    world.check_uncached()


async def test_pinned_blocks_are_written_back_too(world: World) -> None:
    await world.create(nr_dirty=5)
    await world.disk.message(0, ("pin", "0-8"))
    assert await world.uncache() == 0
    world.check_uncached()
    assert (await world.superblock()).nr_mapped == 0


async def test_old_line_finds_an_empty_cache_later(world: World) -> None:
    await world.create(nr_dirty=5)
    assert await world.uncache() == 0
    await world.write(4096, b"new" * 1000)
    await world.registry.load("disk", world.table(), directory=str(world.directory))
    await world.registry.resume("disk")
    assert world.fields["cache_blocks_used"] == 0
    assert await world.disk.read(0, SIZE) == world.content


async def test_clients_go_on(world: World) -> None:
    await world.create(nr_dirty=8)
    rng = random.Random(1)
    requests = 0

    async def client() -> None:
        nonlocal requests
        while not world.recorder.ends:
            at = rng.randrange(SIZE // 4096) * 4096
            if rng.random() < 0.5:
                await world.write(at, rng.randbytes(4096))
            else:
                assert await world.disk.read(at, 4096) == world.content[at : at + 4096]
            requests += 1
            await sleep(0)  # what ends inline takes no turn

    going_on = asyncio.create_task(client())
    assert await world.uncache() == 0
    await going_on
    assert requests > 10
    world.check_uncached()


async def test_cache_in_memory_that_is_not_writeback_is_swapped_at_once(
    world: World,
) -> None:
    table = world.table("128 1 writethrough smq 0", fast="memory:1M")
    await world.registry.create("disk", table, directory=str(world.directory))
    assert await world.uncache() == 0
    world.check_uncached()
    assert world.recorder.drained == []


# ---- when something fails ----


async def test_writeback_that_makes_no_progress_is_reported_and_goes_on(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create(nr_dirty=3)
    fault = world.opener.faults["origin"]
    fault.ops, fault.fail_at = frozenset({OP_WRITE}), 0

    def mend() -> None:
        fault.clear()
        monkeypatch.setattr(uncache, "STUCK_S", PATIENCE_S)

    world.recorder.on_stuck = mend
    assert await world.uncache() == 0
    stuck = world.recorder.stucks[0]
    assert (stuck.dirty_blocks, stuck.dirty_bytes) == (3, 3 * BLOCK)
    assert stuck.errors > 0
    assert stuck.last_error is not None
    assert f"{world.directory}/origin" in stuck.last_error
    assert len(world.recorder.stucks) == 1
    world.check_uncached()


async def test_metadata_that_cannot_be_written_any_more_ends_it(world: World) -> None:
    await world.create(nr_dirty=3)
    before = world.line
    world.opener.faults["meta"].fail_at = 0
    await world.disk.message(0, ("warm", "10-12"))
    while world.fields["mode"] == "rw":
        with suppress(DeviceError):
            await world.disk.flush()
        await sleep(0.01)
    reason = await world.refusal()
    assert "uncache disk: the cache is read-only (" in reason
    assert "load its table again" in reason
    assert world.recorder.ends == []
    assert world.line == before


async def test_uncache_fails_when_the_last_flush_of_the_origin_fails(
    world: World,
) -> None:
    """The blocks written back may be lost again. The command says so, and the cache continues to serve."""
    await world.create(nr_dirty=3)

    def fail(verb: str, request: m.Request) -> None:
        if isinstance(request, m.Message) and request.words == ("clean_now",):
            fault = world.opener.faults["origin"]
            fault.ops, fault.fail_at = frozenset({OP_FLUSH}), 0

    world.before_verb = fail
    assert "a flush of the origin fails" in await world.refusal()
    assert world.recorder.ends == []
    assert world.disk.state is State.ACTIVE
    assert await world.disk.read(0, SIZE) == world.content
    known = await world.superblock()
    assert not known.flags & NEEDS_CHECK
    assert known.nr_mapped == 5


async def test_uncache_changes_nothing_when_a_flush_of_the_origin_fails(
    world: World,
) -> None:
    await world.create(nr_dirty=3)
    before = world.line
    fault = world.opener.faults["origin"]
    fault.ops, fault.fail_at = frozenset({OP_FLUSH, OP_WRITE}), 0
    reason = await world.refusal()
    assert "a flush of the origin fails" in reason
    assert "Input/output error" in reason
    assert "Run this command again" in reason
    assert world.line == before
    assert world.fields["mode"] == "rw"
    await world.write(0, b"w" * BLOCK)
    fault.clear()
    assert await world.uncache() == 0
    world.check_uncached()


async def test_errors_of_the_table_before_are_not_counted_against_the_new_one(
    world: World,
) -> None:
    await world.create(nr_dirty=3)
    fault = world.opener.faults["origin"]
    fault.ops, fault.fail_at = frozenset({OP_WRITE}), 0
    await world.disk.message(0, ("clean_now",))
    while world.fields["errors"] == 0:
        await sleep(0.01)
    world.recorder.on_stuck = fault.clear
    assert await world.uncache() == 0
    assert world.recorder.stucks[0].errors > 0
    assert all(now.errors >= 0 for now in world.recorder.drained)


async def test_block_that_gets_dirty_again_is_waited_for_again(world: World) -> None:
    """For example, a write-through whose write to the origin has failed makes a block dirty again."""
    await world.create(nr_dirty=3)
    refused = 0

    def dirty_one(verb: str, request: m.Request) -> None:
        nonlocal refused
        if not isinstance(request, m.Load) or " passthrough " not in request.table:
            return
        refused += 1
        if refused == 1:
            assert world.disk.active is not None
            target = world.disk.active.targets[0]
            assert isinstance(target, CacheTarget)
            target._blocks.set_dirty(next(iter(target._metadata.dirty.search(0))))

    world.before_verb = dirty_one
    assert await world.uncache() == 0
    assert refused == 2
    world.check_uncached()


async def test_table_that_is_refused_is_cleared(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.create(nr_dirty=3)

    async def refuse(self: LinearTarget) -> None:
        raise TableError("not today")

    monkeypatch.setattr(LinearTarget, "preresume", refuse)
    assert "not today" in await world.refusal()
    words = "128 1 passthrough cleaner 2 migration_threshold 1024"
    assert world.line == world.table(words)
    assert await world.disk.read(0, SIZE) == world.content
    monkeypatch.undo()
    assert await world.uncache() == 0
    world.check_uncached()


async def test_what_the_line_says_besides_its_mode_is_kept(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    features = "metadata2 no_discard_passdown dirty_log sorted_writeback"
    await world.create(f"128 5 writeback {features} smq 0", nr_dirty=3)
    await world.disk.message(0, ("migration_rate", "1000000"))

    async def refuse(self: LinearTarget) -> None:
        raise TableError("not today")

    monkeypatch.setattr(LinearTarget, "preresume", refuse)
    assert "not today" in await world.refusal()
    tunables = "4 migration_threshold 2048 migration_rate 1000000"
    assert world.line == world.table(f"128 5 passthrough {features} cleaner {tunables}")


async def test_an_origin_that_does_not_answer_is_reported(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uncache, "ORIGIN_S_MAX", 0.1)
    await world.create(nr_dirty=3)
    before = world.line
    answers = threading.Event()

    def hang(verb: str, request: m.Request) -> None:
        if isinstance(request, m.Message) and request.words == ("flush_origin",):
            answers.wait(PATIENCE_S)

    world.before_verb = hang
    assert "the origin has not answered a flush for 0.1 s" in await world.refusal()
    answers.set()
    monkeypatch.setattr(uncache, "ORIGIN_S_MAX", PATIENCE_S)
    assert world.line == before
    assert await world.disk.read(0, SIZE) == world.content
    assert await world.uncache() == 0
    world.check_uncached()


async def test_a_swap_that_waits_too_long_leaves_the_cache_as_it_was(
    world: World,
) -> None:
    await world.create(nr_dirty=3)
    before = world.line

    def hang(verb: str, request: m.Request) -> None:
        if isinstance(request, m.Resume):
            raise TableError("no answer from origin for 60 s", errnos.ETIMEDOUT)

    world.before_verb = hang
    assert (
        "no answer from origin for 60 s; the dirty blocks are still in the cache"
        in (await world.refusal())
    )
    assert (world.line, world.disk.inactive) == (before, None)
    assert await world.disk.read(0, SIZE) == world.content
    world.before_verb = lambda verb, request: None
    assert await world.uncache() == 0
    world.check_uncached()


async def test_cache_whose_origin_was_renamed_is_left_alone(world: World) -> None:
    """The disk that is served has another name now, and another disk has its name."""
    await world.create(nr_dirty=3)
    before = world.line
    origin = world.directory / "origin"
    origin.rename(world.directory / "renamed")
    origin.write_bytes(bytes(SIZE))
    assert "has another disk open under this name" in await world.refusal()
    assert world.line == before
    assert origin.read_bytes() == bytes(SIZE)
    (world.directory / "renamed").rename(origin)
    assert await world.uncache() == 0
    world.check_uncached()


# ---- what is refused ----


async def test_device_that_is_not_there(world: World) -> None:
    assert "Device does not exist" in await world.refusal("nosuch")


@pytest.mark.parametrize(
    ("table", "reason"),
    [
        (f"0 {NR_SECTORS} linear origin 0", "is not a cache: its table is linear"),
        (
            f"0 {NR_SECTORS} cache meta fast origin {WRITEBACK}\n{NR_SECTORS} 8 zero",
            "not the only target of its table, which is cache, zero",
        ),
        (
            f"0 {NR_SECTORS} cache meta memory:1M origin {WRITEBACK}",
            "its cache or metadata is in memory",
        ),
        (
            f"0 {NR_SECTORS} cache meta fast memory:2M {WRITEBACK}",
            "its origin is in memory",
        ),
    ],
)
async def test_table_that_is_not_one_cache_is_refused(
    world: World, table: str, reason: str
) -> None:
    await world.registry.create("disk", table, directory=str(world.directory))
    before = world.disk.table()
    assert reason in await world.refusal()
    assert world.disk.table() == before


async def test_device_without_a_table(world: World) -> None:
    await world.registry.create("disk", None)
    assert "is not a cache: it has no table" in await world.refusal()


async def test_device_that_is_suspended(world: World) -> None:
    await world.create()
    await world.registry.suspend("disk")
    assert "is suspended" in await world.refusal()


async def test_device_with_an_inactive_table(world: World) -> None:
    await world.create()
    await world.registry.load("disk", f"0 {NR_SECTORS} zero")
    assert "inactive table" in await world.refusal()
    assert world.disk.inactive is not None


async def test_cache_over_another_mapped_device_and_names_with_blanks(
    world: World,
) -> None:
    (world.directory / "origin").rename(world.directory / "my origin")
    (world.directory / "fast").rename(world.directory / "my fast")
    below = f"0 {NR_SECTORS} linear my\\ origin 0"
    await world.registry.create("below", below, directory=str(world.directory))
    table = f"0 {NR_SECTORS} cache my\\ meta my\\ fast /dev/mapper/below {WRITEBACK}"
    await world.registry.create("disk", table, directory=str(world.directory))
    await world.write(0, os.urandom(BLOCK))
    assert await world.uncache() == 0
    assert world.line == f"0 {NR_SECTORS} linear /dev/mapper/below 0"
    assert await world.disk.read(0, SIZE) == world.content
    assert (world.directory / "my origin").read_bytes() == world.content
