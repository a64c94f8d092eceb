# SPDX-License-Identifier: Apache-2.0
"""Rules that clone and cache have in common. Each test is run with both."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import TableError
from nbdtarget.devices.base import Device, QueueLimits
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.base import KILL, Target
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.mode import Mode
from tests.support.clock import SimClock, settle
from tests.support.clone import Context
from tests.support.spy import Spy

BLOCK = 32 << 10
SIZE = 8 * BLOCK
BEGIN = 4 * BLOCK

CLONE = "m d s 64 0 2 hydration_threshold 0"
CACHE = "m c o 64 0 smq 0"


class Disks:
    """A context with all the devices that a clone or a cache may name."""

    def __init__(self) -> None:
        self.metadata = Spy(MemoryDevice(4 << 20, name="m"), [])
        devices: dict[str, Device] = {
            name: MemoryDevice(SIZE, name=name) for name in ("d", "s", "c", "o")
        }
        self.ctx = Context({"m": self.metadata, **devices}, SIZE, SimClock(), BEGIN)

    async def target(self, words: str) -> CloneTarget | CacheTarget:
        """Construct and resume a target."""
        kind = CloneTarget if "d" in words.split() else CacheTarget
        target = await kind.ctr(self.ctx, words.split())
        assert isinstance(target, CloneTarget | CacheTarget)
        await target.preresume()
        target.resume()
        return target


async def stopped(target: Target) -> None:
    target.presuspend()
    await target.postsuspend()
    await target.dtr()


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_table_words_are_those_that_were_given(words: str) -> None:
    target = await Disks().target(words)
    assert target.table_words() == words
    await stopped(target)


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_destruction_closes_every_device(words: str) -> None:
    disks = Disks()
    target = await disks.target(words)
    assert disks.ctx.nr_open == 3
    await stopped(target)
    assert disks.ctx.nr_open == 0


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_a_refused_resume_ends_the_commit_that_it_has_begun(
    words: str,
) -> None:
    disks = Disks()
    kind = CloneTarget if words is CLONE else CacheTarget
    target = await kind.ctr(disks.ctx, words.split())
    answers: list[int] = []

    async def refuse() -> None:
        target._committer.note_change()
        target._committer.after_commit(answers.append)
        raise TableError("another disk")

    vars(target)["_get_ready"] = refuse
    with pytest.raises(TableError):
        await target.preresume()
    assert answers == [0]
    await target.dtr()  # it asserts that nothing is under way
    assert disks.ctx.nr_open == 0


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_status_says_that_the_metadata_has_failed(words: str) -> None:
    target = await Disks().target(words)
    assert (await target.status()).startswith("8 ")
    target._broken(AssertionError("planted"))
    assert await target.status() == "Fail"
    assert target.has_lost_writes()
    await stopped(target)


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_status_whose_commit_fails_altogether_is_an_error(words: str) -> None:
    """The kernel says `Error`: the mode was not Fail when it was asked."""
    disks = Disks()
    target = await disks.target(words)
    write = Bio(OP_WRITE, BEGIN, BLOCK, memoryview(bytes(BLOCK)), 0, lambda _: None)
    target.map(write)
    await settle()
    assert write.status == 0
    disks.metadata.fails = lambda bio: errnos.EIO
    assert target._metadata.changed
    assert await target.status() == "Error"
    await stopped(target)


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_exception_of_our_own_making_is_an_event_and_fails_all(
    words: str,
) -> None:
    disks = Disks()
    target = await disks.target(words)
    events = disks.ctx.nr_events
    target._broken(AssertionError("planted"))
    assert disks.ctx.nr_events == events + 1
    assert target._metadata.mode is Mode.FAIL
    read = Bio(OP_READ, BEGIN, 512, memoryview(bytearray(512)), 0, lambda _: None)
    assert target.map(read) == KILL or read.status == errnos.EIO
    flush = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
    assert target.map(flush) == KILL
    await stopped(target)


@pytest.mark.parametrize("words", [CLONE, CACHE])
async def test_only_its_own_context_describes_anything(words: str) -> None:
    target = await Disks().target(words)
    (own,) = target.contexts
    assert [tuple(run) for run in await target.context_extents("other", 0, 512)] == [
        (512, 0)
    ]
    described = await target.context_extents(own, BEGIN, SIZE)
    assert sum(run.length for run in described) == SIZE
    await stopped(target)


@pytest.mark.parametrize(
    ("words", "granularity"),
    [
        (CLONE, 0),
        (CACHE, 0),
        ("m d s 64 1 no_discard_passdown", BLOCK),
        ("m c o 64 1 no_discard_passdown smq 0", BLOCK),
    ],
)
async def test_hints_are_the_block_and_the_discards_that_end_here(
    words: str, granularity: int
) -> None:
    target = await Disks().target(words)
    assert target.io_hints(QueueLimits()) == QueueLimits(512, BLOCK, BLOCK, granularity)
    suits = QueueLimits(512, 4096, 2 * BLOCK)
    assert target.io_hints(suits)[:3] == suits[:3]
    await stopped(target)
