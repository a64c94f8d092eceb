# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget uncache` on a simulated machine: the real job, whose questions go to the life's own verbs.

The power may go at any step, a server may go away, and the person who has typed it may press Ctrl-C: once,
which the job heeds when it may, or twice, which ends its process at once. What the server was
asked by then it does all the same; nothing comes after it.

When the job says that it is done, the origin alone is the disk: the metadata map no block any more, durably, and
the next life may be given the cache's line or `linear`. Until then, whatever happened, the cache's line
serves all.
"""

import asyncio
import random
import signal
from typing import TYPE_CHECKING, Final

from nbdtarget.control import messages as m
from nbdtarget.control.uncache import A, CacheLine, Draining, UncacheJob
from nbdtarget.porcelain.uncache import interrupts
from nbdtarget_metadata.cache.superblock import CACHE
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import SUPERBLOCK_BLOCKS, choose_superblock

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = ["INTERRUPTED", "KILLED", "SimUncache", "check_empty", "uncache"]

INTERRUPTED: Final = 130
KILLED: Final = 137
STEP_S: Final = 0.2
PRESSES_S: Final = (0.0, 0.001, 0.1, 1.0)  # Ctrl-C, after that time
PATIENCE_S: Final = 120.0


class _Terminal:
    """A reporter that prints nothing."""

    def draining(self, now: Draining) -> None:
        """Nothing."""

    def stuck(self, now: Draining, for_s: float) -> None:
        """Nothing."""

    def interrupted(self, now: Draining | None) -> None:
        """Nothing: the exit status says it."""

    def uncached(self, line: CacheLine) -> None:
        """Nothing: the exit status says it."""


class SimUncache(UncacheJob):
    """The job, in a process that shares nothing with the server but the control socket."""

    def __init__(self, life: "Life") -> None:
        super().__init__("d", self._do_for_us, _Terminal())
        self._life = life
        self.asked: asyncio.Task[m.Answer] | None = None  # what the server does for us

    async def _do_for_us(
        self, verb: str, request: m.Request, answer_type: type[A]
    ) -> A:
        self._life.note("uncache", verb)
        asked = asyncio.ensure_future(self._do(verb, request))
        self.asked = asked
        answer = await asyncio.shield(asked)
        assert isinstance(answer, answer_type)
        return answer

    async def _do(self, verb: str, request: m.Request) -> m.Answer:
        answer: m.Answer = await getattr(self._life.verbs, verb)(request)
        if verb == "load":
            self._life.watch_cache()
        return answer


async def _run(job: SimUncache) -> int:
    with interrupts(job.stop):
        return 0 if await job.run() else INTERRUPTED


async def uncache(life: "Life", rng: random.Random) -> int:
    """Run the job to its end. Returns its exit status. Raises: NbdTargetError."""
    job = SimUncache(life)
    running = asyncio.ensure_future(_run(job))
    loop = life.loop
    first_s = rng.choice(PRESSES_S) if rng.random() < 0.3 else PATIENCE_S
    second_s = first_s + (rng.choice(PRESSES_S) if rng.random() < 0.5 else PATIENCE_S)
    pressed_s = [loop.time() + after_s for after_s in (first_s, second_s)]
    while not running.done():
        left_s = pressed_s[0] - loop.time()
        await asyncio.wait([running], timeout=max(0.0, min(STEP_S, left_s)))
        if running.done() or not (life.is_stopping or left_s <= STEP_S):
            continue
        if life.is_stopping or loop.time() >= pressed_s[0]:
            del pressed_s[0]
            life.note("uncache", "Ctrl-C")
            if not loop.press(signal.SIGINT) or not pressed_s:
                running.cancel()
                await asyncio.wait([running])
                await _wait_for_server(job)
                return KILLED
    return running.result()


async def _wait_for_server(job: SimUncache) -> None:
    """Wait until the server has carried out the request of a killed process, and drop the answer."""
    if job.asked is not None:
        await asyncio.wait([job.asked])
        if not job.asked.cancelled():
            job.asked.exception()


def check_empty(life: "Life") -> None:
    """Check that the metadata of a cache whose `uncache` has succeeded maps no block. Raises: AssertionError."""
    image = life.disks["/metadata"].stable_image()
    area = memoryview(image)[: SUPERBLOCK_BLOCKS * BLOCK_SIZE]
    found = choose_superblock(CACHE, area).superblock
    assert not found.nr_mapped, f"uncached, and {found.nr_mapped} blocks are mapped"
