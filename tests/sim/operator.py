# SPDX-License-Identifier: Apache-2.0
"""The operator of a simulated machine: says and asks all that may be said and asked, at any time.

Each deed is drawn from the seed, and goes to any mapped device of the stack, not only to the
one on top. One deed follows another; within one, two devices may be suspended at once.

Outages. A `powercut` device of the rig is cut by message. Where what stands on it keeps nothing
in memory, clients lose what they have not flushed, and go on. Where a clone stands on it, one of:

    suspended   everything is durable when the power goes: no client may notice
    the end     nothing is told any more that is not so, until the machine is off, too
    anew        the clone's table is wiped, the power comes back, the clone is loaded again
"""

import asyncio
import errno as errnos
import itertools
import random
from typing import TYPE_CHECKING, Final

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control import messages as m
from nbdtarget.control.uncache import UncacheError
from nbdtarget.dm.bio_path import State
from tests.sim.uncache import KILLED, check_empty, uncache

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = ["REFUSALS", "Operator"]

# How a reload into passthrough may end.
REFUSALS: Final = (
    "unable to resume into passthrough mode after unclean shutdown",
    "cannot enter passthrough mode unless all blocks are clean",
)
PAUSES_S: Final = (0.001, 0.1, 2.0)
FATES: Final = ("keep", "drop", "tear", "mixed")
RESUMES_MAX: Final = 20  # of a device on a slow disk
LAST_STEPS_MAX: Final = 300  # from a cut below to the end of the machine


class Operator:
    """See the module head.

    Attributes:
        unflushed: devices that are suspended now, in a way that does not make what stands
            on them, or what they have, durable when the machine stops like this.
    """

    def __init__(self, life: "Life", rng: random.Random) -> None:
        self.unflushed: set[str] = set()
        self._life = life
        self._rig = life.rig
        self._verbs = life.verbs
        self._random = rng
        self._names = list(life.rig.tables)
        deeds = [self._status, self._message, self._suspend, self._reload, self._look]
        if life.rig.below:
            deeds += [self._suspend_below, self._remove_what_is_used]
        if life.rig.powercut:
            deeds.append(self._cut_power)
        if life.rig.backends:
            deeds += [self._cure, self._cure]
        if life.rig.uncached:
            deeds.append(self._uncache)
        self._deeds = deeds

    async def run(self) -> None:
        life, rng = self._life, self._random
        pause_s = rng.choice(PAUSES_S)
        while not life.is_stopping:
            await asyncio.sleep(rng.random() * pause_s)
            if life.are_clients_done():
                return
            deed = rng.choice(self._deeds)
            self._note(deed.__name__)
            nr_departures, was_well = life.nr_departures, life.are_backends_well
            try:
                await deed()
            except NbdTargetError as error:
                self._note("refused", error)
                # A server that hangs shakes no hands, and lets nothing be suspended in time.
                is_hanging = not was_well or nr_departures != life.nr_departures
                if is_hanging or (_is_overdue(error) and life.is_slow):
                    await self._resume_all()
                    continue
                if not (life.is_stopping or life.may_fail):
                    raise
                if self._is_stuck():
                    # At once: when the clients are done there may be no step but our own.
                    life.loop.cut_at = life.loop.steps + 1

    async def _resume_all(self) -> None:
        """A disk is too slow for a suspend: what is suspended all the same is let go again."""
        for name in [*self._names, "d"]:
            for _ in range(RESUMES_MAX):
                device = self._life.registry.maybe_device(name)
                if device is None or self._life.is_stopping:
                    return
                try:
                    await self._verbs.resume(m.Resume(name))
                    self.unflushed.discard(name)
                    break
                except NbdTargetError as error:
                    self._note("refused", error)
                    if self._life.is_stopping:
                        return  # the device is removed, or will be
                    if not _is_overdue(error):
                        # The slot's table is refused: without it the device goes on.
                        await self._verbs.clear(m.Clear(name))

    def _is_stuck(self) -> bool:
        """Whether a table was refused at its resume, and no other one can be loaded.

        A cache whose metadata need a check is none for the running machine to mend.
        """
        device = self._life.registry.maybe_device("d")
        return bool(
            self._rig.others
            and device is not None
            and device.state is State.SUSPENDED
            and "d" not in self.unflushed
        )

    def _note(self, *what: object) -> None:
        self._life.note("operator", *what)

    def _any_device(self) -> str:
        return self._random.choice([*self._names, "d"])

    # ---- looking ----

    async def _status(self) -> None:
        noflush = self._random.random() < 0.3
        answer = await self._verbs.status(m.Status(noflush=noflush))
        if not self._life.may_fail:
            self._rig.check_status(
                [
                    (line.type, line.params)
                    for device in answer.devices
                    for line in device.lines
                ]
            )

    async def _look(self) -> None:
        await self._verbs.table(m.Table(inactive=self._random.random() < 0.3))
        info = await self._verbs.info(m.Info())
        assert not any(device.failed for device in info.devices)

    # ---- changing ----

    async def _message(self) -> None:
        if not self._rig.messages:
            return
        name, sector, words = self._random.choice(self._rig.messages)
        try:
            await self._verbs.message(m.Message(name, sector, words))
        except TableError as error:
            if name == "d" and error.errno in self._rig.refusals:
                self._note("refused", error)
                return  # not in this mode, or not now
            if name == "d" and self._rig.uncached and not await self._has_cache():
                return
            # The clone may have become a linear target, which takes no messages.
            if (name == "d" and self._rig.others) or await self._has_clone(
                name, sector
            ):
                raise

    async def _has_cache(self) -> bool:
        answer = await self._verbs.table(m.Table(("d",)))
        return any(line.type == "cache" for line in answer.devices[0].lines)

    async def _has_clone(self, name: str, sector: int) -> bool:
        answer = await self._verbs.table(m.Table((name,)))
        lines = [line for device in answer.devices for line in device.lines]
        return any(line.type == "clone" and line.start == sector for line in lines)

    async def _suspend(self) -> None:
        rng = self._random
        name, noflush = self._any_device(), rng.random() < 0.2
        if noflush or name != "d":
            self.unflushed.add(name)
        await self._verbs.suspend(m.Suspend(name, noflush=noflush))
        self._note("suspended", name, noflush)
        await asyncio.sleep(rng.choice((0.0, 0.001, 1.0)))
        await self._verbs.resume(m.Resume(name))
        self.unflushed.discard(name)

    async def _suspend_below(self) -> None:
        """An upper device is suspended while a lower one is: it waits for its bios."""
        rng = self._random
        name = rng.choice(self._names[:-1])
        self.unflushed.add(name)
        await self._verbs.suspend(m.Suspend(name))
        upper = asyncio.ensure_future(self._verbs.suspend(m.Suspend("d")))
        await asyncio.sleep(rng.choice((0.0, 0.001, 1.0)))
        try:
            await self._verbs.resume(m.Resume(name))
        finally:
            await upper
        self.unflushed.discard(name)
        await self._verbs.resume(m.Resume("d"))

    async def _reload(self) -> None:
        rng = self._random
        name = self._any_device()
        table = self._rig.tables[name]
        if name == "d" and self._rig.others and rng.random() < 0.8:
            table = rng.choice(self._rig.others)
            self._note("loads", table)
        if name == "d":
            self._life.is_uncached = False
        await self._verbs.load(m.Load(name, table))
        self._life.watch_cache()
        await asyncio.sleep(rng.choice((0.0, 0.1)))
        if rng.random() < 0.1:
            await self._verbs.clear(m.Clear(name))
            return
        try:
            await self._verbs.resume(m.Resume(name))
        except TableError as error:
            if not any(reason in str(error) for reason in REFUSALS):
                raise
            self._life.counts["refusals"] += 1
            self._note("refused", error)
            await self._verbs.load(m.Load(name, self._rig.tables[name]))
            self._life.watch_cache()
            await self._verbs.resume(m.Resume(name))

    async def _cure(self) -> None:
        """Load the same table again after all servers are back: then everything must work."""
        life = self._life
        if not life.is_hurt or not life.are_backends_well:
            return
        nr_departures = life.nr_departures
        load = m.Load("d", self._rig.table)
        life.is_uncached = False
        try:
            await self._verbs.load(load)
            await self._verbs.resume(m.Resume("d"))
        except NbdTargetError as error:
            is_well = nr_departures == life.nr_departures and life.fault is None
            # The old table's last commit has failed: what was loaded before that is stale.
            is_stale = "load it again" in str(error)
            if is_well and not (is_stale or life.is_stopping):
                raise AssertionError("all is well, and a table is refused") from error
            raise
        # If a commit fails between load and resume, the new table has the old one's metadata.
        if await self._is_writable() and nr_departures == life.nr_departures:
            life.recovered()

    async def _is_writable(self) -> bool:
        answer = await self._verbs.status(m.Status(("d",), noflush=True))
        return all(
            "rw" in line.params.split()
            for device in answer.devices
            for line in device.lines
            if line.type in ("clone", "cache")
        )

    async def _uncache(self) -> None:
        """The cache goes home and away; see `tests.sim.uncache`."""
        life = self._life
        if self._random.random() < 0.5 or not await self._has_cache():
            return
        life.counts["uncaches"] += 1
        try:
            status = await uncache(life, self._random)
        except UncacheError as error:
            if not life.is_slow:
                raise
            self._note("refused", error)
            return
        self._note("uncached", status)
        life.counts[f"uncached {status}"] += 1
        if status == 0:
            life.is_uncached = True
            check_empty(life)
        elif status == KILLED and not life.is_stopping:
            # A killed `uncache` may have loaded a table without resuming it.
            await self._verbs.clear(m.Clear("d"))

    async def _remove_what_is_used(self) -> None:
        name = self._random.choice(self._names[:-1])
        if not self._life.registry.get(name).open_count:
            return  # `then_linear` has let go of the metadata
        try:
            await self._verbs.remove(m.Remove(name))
        except TableError as error:
            if error.errno != errnos.EBUSY and not self._life.is_stopping:
                raise
        else:
            assert self._life.is_stopping, f"{name} is in use, and was removed"

    # ---- the power ----

    async def _powercut(self, *words: str) -> None:
        await self._verbs.message(m.Message(self._rig.powercut, 0, words))

    def _fate(self) -> tuple[str, str]:
        return self._random.choice(FATES), str(self._random.randrange(1 << 32))

    async def _cut_power(self) -> None:
        """See the module head."""
        life = self._life
        if life.is_stopping:
            return
        async with life.is_cutting:
            if not self._rig.starts_anew:
                await self._cut_and_go_on()
                return
            ways = [self._cut_suspended, self._cut_and_end]
            if not life.is_slow:  # else the table may not be wiped in time
                ways.append(self._cut_and_load)
            await self._random.choice(ways)()

    async def _cut_and_go_on(self) -> None:
        life, rng = self._life, self._random
        life.begin_outage(loses=True)
        try:
            if rng.random() < 0.7:
                await self._powercut("cycle", *self._fate())
            else:
                await self._powercut("cut", *self._fate())
                await asyncio.sleep(rng.choice((0.0, 0.001, 0.5)))
                await self._powercut("on")
        finally:
            life.end_outage()

    async def _cut_suspended(self) -> None:
        await self._verbs.suspend(m.Suspend("d"))
        try:
            await self._powercut("cycle", *self._fate())
        finally:
            # Also if it is refused, as a cut before this one could not be ended.
            await self._verbs.resume(m.Resume("d"))

    async def _cut_and_end(self) -> None:
        life = self._life
        life.begin_outage(loses=False)
        await self._powercut("cut", *self._fate())
        life.loop.cut_at = life.loop.steps + self._random.randrange(1, LAST_STEPS_MAX)
        for _ in itertools.count():
            await asyncio.sleep(0.001)  # time goes on, until that step

    async def _cut_and_load(self) -> None:
        life, rng = self._life, self._random
        life.begin_outage(loses=True)
        try:
            await self._powercut("cut", *self._fate())
            await asyncio.sleep(rng.choice((0.0, 0.001, 0.5)))
            await self._verbs.wipe_table(m.WipeTable("d"))
            await self._powercut("on")
            await self._verbs.load(m.Load("d", self._rig.table))
            await self._verbs.resume(m.Resume("d"))
        finally:
            life.table_has_lost()
            life.end_outage()


def _is_overdue(error: NbdTargetError) -> bool:
    """Whether a verb was given up because a disk takes too long."""
    return isinstance(error, TableError) and error.errno == errnos.ETIMEDOUT
