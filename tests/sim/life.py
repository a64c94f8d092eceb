# SPDX-License-Identifier: Apache-2.0
"""One life of the simulated machine: from power on to power off, or to a clean end.

Theory of operation. A `Life` boots a registry and an NBD listener on the disks as they are,
looks at the whole disk through a client (what a crash left is held against the model here), lets
clients and an operator loose on it, and ends in one of these ways, drawn beforehand (`Plan`):

    cut       the power goes before the loop's step number `cut_step`, wherever that is: in the
              handshake, in a commit, in the boot itself; or some steps after a disk has
              carried out its FLUSH or FUA number `cut_at_durable`, or some client has got
              the answer number `cut_at_promise` to one: where a wrong order shows
    kill      as `cut`, but only the process dies: the disks keep all that was carried out
    shutdown  as SIGTERM does, when the clients are done or in the middle of it all; by seed
              the power goes during that

All that happens is one sequence of steps on one `SimLoop`. What fails, anywhere on the
machine, is in `failure`: an oracle's Violation, an exception that nobody caught, a log
line of level ERROR (no disk fails here, so there is nothing to complain about).
"""

import asyncio
import random
import socket
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, cast

from nbdtarget.bio import FUA, OP_FLUSH, OP_NAMES, OP_READ, Bio
from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm.registry import Registry
from nbdtarget.errors import NbdTargetError
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.volatile_cache import BORDERS, Fate
from tests.crash.rigs import DeviceTable
from tests.sim.client import Client, Habits
from tests.sim.disks import LATENCIES, SimDisk
from tests.sim.loop import PowerCut, SimLoop, SimLoopClock, Stuck
from tests.sim.model import SECTOR, ClientModel
from tests.sim.rigs import Rig
from tests.sim.sockets import SimNetwork, SimSocket
from tests.support.devices import CrashDevice

__all__ = ["Life", "Plan"]

LIFE_S_MAX: Final = 24 * 3600.0  # simulated; whatever waits longer is stuck
GRACE_S: Final = 10.0  # as the daemon's
BURIAL_STEPS_MAX: Final = 20_000
VERIFY_BYTES: Final = 16 * SECTOR


@dataclass(frozen=True)
class Plan:
    """What will happen in a life. None: not at all."""

    nr_clients: int
    nr_requests: int  # of each client
    cut_step: int | None
    cut_at_durable: tuple[int, int] | None  # after which FLUSH or FUA, how many steps
    cut_at_promise: tuple[int, int] | None  # after which answer to one, how many steps
    shutdown_after_s: float | None  # in the middle of it all
    cut_in_shutdown: int | None  # that many steps into it
    fate: Fate
    afterwards_s: float  # quiet, when the clients are done
    operates: bool

    @classmethod
    def draw(cls, rng: random.Random) -> "Plan":
        cut = rng.choice(("step", "step", "durable", "promise", "none"))
        return cls(
            nr_clients=rng.choice((1, 1, 2, 3, 4)),
            nr_requests=rng.choice((5, 20, 40)),
            cut_step=int(10 ** rng.uniform(0.5, 3.2)) if cut == "step" else None,
            cut_at_durable=_draw_nth(rng) if cut == "durable" else None,
            cut_at_promise=_draw_nth(rng) if cut == "promise" else None,
            shutdown_after_s=rng.choice((None, 10 ** rng.uniform(-4, 1))),
            cut_in_shutdown=rng.choice((None, rng.randrange(1, 150))),
            fate=rng.choice((Fate.MIXED, Fate.MIXED, Fate.TEAR, Fate.DROP, Fate.KEEP)),
            afterwards_s=rng.choice((0.0, 0.0, 1.5, 20.0)),
            operates=rng.random() < 0.6,
        )

    @classmethod
    def last(cls) -> "Plan":
        """Only look at what is there."""
        return cls(0, 0, None, None, None, None, None, Fate.DROP, 0.0, False)


def _draw_nth(rng: random.Random) -> tuple[int, int]:
    """Which one, more often an early one, and how many steps after it."""
    return int(10 ** rng.uniform(0, 1.7)), rng.randrange(1, 8)


def draw_limits(rng: random.Random) -> Limits:
    """Bounds so small that they are met all the time, or the usual ones on a small scale."""
    own_min = rng.choice((512, 2048))
    arena_read_max = rng.choice((1024, 4096))
    small = rng.random() < 0.5
    return Limits(
        requests_in_flight_max=rng.choice((1, 3)) if small else 64,
        requests_total_max=4 if small else 256,
        bytes_in_flight_max=64 << 10,
        bytes_total_max=128 << 10,
        payload_max=64 << 10,
        send_buffer_max=1024 if small else 32 << 10,
        send_queue_max=2 if small else 64,
        receive_buffer=2 * own_min + (16 << 10),
        arena=arena_read_max + (1 << 10) if small else 32 << 10,
        arena_read_max=arena_read_max,
        own_payload_min=own_min,
        zero_check_min=512 if small else 4096,
        flush_at=512 if small else 8 << 10,
        pool_bytes_max=1 << 20,
        poll_us=0,
        poison_borrowed=True,
    )


class Life:
    """See the module head.

    Args:
        note: is told everything that happens.
        images: what is on each disk of the rig.
        has_booted: an earlier life has: there is metadata.

    Attributes:
        is_stopping: clients may be refused.
        failure: the first thing that went wrong.
    """

    def __init__(
        self,
        rig: Rig,
        model: ClientModel,
        plan: Plan,
        seed: str,
        images: dict[str, bytes],
        note: Callable[..., None],
        *,
        now_s: float = 0.0,
        has_booted: bool = False,
        disk_type: type[SimDisk] = SimDisk,
    ) -> None:
        self.rig = rig
        self.model = model
        self.plan = plan
        self.has_booted = has_booted
        self.is_stopping = False
        self.is_over = False
        self.was_cut = False
        self.ended_s = now_s
        self.failure: BaseException | None = None
        self.nr_requests = 0
        self.clients: list[Client] = []
        self._seed = seed
        self._random = rng = random.Random(seed)
        self._note = note
        self._limbo: list[tuple[SimSocket, list[Any]]] = []
        self._stamp = 0
        self._is_unflushed = False  # suspended without a flush: nor does removal
        self._nr_durable = 0
        self._nr_promised = 0
        self.loop = SimLoop(rng.randrange(1 << 32), now_s=now_s)
        self.loop.set_exception_handler(self._escaped)
        self.loop.deadline_s = now_s + LIFE_S_MAX
        self.loop.cut_at = plan.cut_step
        self.clock = SimLoopClock(self.loop)
        self.network = SimNetwork(
            self.loop,
            random.Random(rng.randrange(1 << 32)),
            partial=rng.choice((0.0, 0.2, 0.8)),
            again=rng.choice((0.0, 0.1)),
            capacity=rng.choice((300, 4096, 64 << 10)),
            family=rng.choice((socket.AF_UNIX, socket.AF_INET)),
        )
        self.disks: dict[str, SimDisk] = {}
        for disk in rig.disks:
            latency = rng.choice(list(LATENCIES))
            device = disk_type(
                disk.size,
                rng.randrange(1 << 32),
                content=images[disk.name],
                name=disk.name,
                inline_chance=LATENCIES[latency].inline,
                border=rng.choice(BORDERS),
            )
            device.latency = LATENCIES[latency]
            device.watchers.append(self)
            self.disks[disk.name] = device
            self.note("boot", disk.name, latency)

    # ---- what happens ----

    def note(self, who: str, *what: object) -> None:
        if not self.is_over:
            self._note(self.loop.time(), self.loop.steps, who, *what)

    def started(self, device: CrashDevice, bio: Bio) -> None:
        """A disk was given a bio; `finished` is what counts."""

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        """A disk has carried out a bio."""
        self.note(device.name, OP_NAMES[bio.op], bio.offset, bio.length, bio.flags)
        if bio.op == OP_FLUSH or (bio.op != OP_READ and bio.flags & FUA):
            self._nr_durable += 1
            self._cut_after(self.plan.cut_at_durable, self._nr_durable)

    def promised(self) -> None:
        """A client has the answer to a FLUSH or a FUA write."""
        self._nr_promised += 1
        self._cut_after(self.plan.cut_at_promise, self._nr_promised)

    def _cut_after(self, nth: tuple[int, int] | None, nr: int) -> None:
        if nth is not None and nth[0] == nr and not self.is_over:
            self.loop.cut_at = self.loop.steps + nth[1]

    def fail(self, error: BaseException) -> None:
        """The first failure ends this life at once."""
        if not self.is_over and self.failure is None:
            self.failure = error
            self.loop.cut_at = self.loop.steps + 1

    def _escaped(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        self.fail(context.get("exception") or AssertionError(context["message"]))

    # ---- what clients ask ----

    def stamped(self, offset: int, length: int) -> bytes:
        """Bytes that no other write and no other place can have."""
        self._stamp += 1
        return random.Random(f"{self._seed} {self._stamp} {offset}").randbytes(length)

    def may_change(self, offset: int, length: int) -> bool:
        """Whether no write to the range is in flight, or may still land."""
        if any(op.overlaps(offset, length) for c in self.clients for op in c.changes()):
            return False
        self._limbo = [entry for entry in self._limbo if self._is_served(entry[0])]
        if any(op.overlaps(offset, length) for _, ops in self._limbo for op in ops):
            return False
        edges = offset, offset + length
        return all(self.model.is_certain_at(edge) for edge in edges)

    def put_in_limbo(self, sock: SimSocket, changes: list[Any]) -> None:
        """A connection was lost with these writes in flight."""
        if changes:
            assert sock.peer is not None
            self._limbo.append((sock.peer, changes))

    def _is_served(self, server: SimSocket) -> bool:
        """Whether the server may still do anything for this end of a connection."""
        if server.fileno() >= 0:
            return True
        connections = self.listener._connections
        return any(c._sock is cast(socket.socket, server) for c in connections)

    # ---- a life ----

    def run(self) -> dict[str, bytes]:
        """Live; return what is on the disks afterwards. Raises: `failure`."""
        fate = self.plan.fate
        try:
            self.loop.run_until_complete(self._live())
            self.note("end")
        except PowerCut:
            if self.failure is None:
                self.was_cut = True
                self.note("power cut", fate.value)
                for client in self.clients:
                    self._try(client.power_cut)
        except Exception as error:
            self.fail(error)
        self.is_over = True
        self.ended_s = self.loop.time()
        images = {
            disk.name: disk.crash(self._random.randrange(1 << 32), fate)
            for disk in self.disks.values()
        }
        if self.failure is None:
            for disk in self.rig.disks:
                self._check_disk(disk.name, images[disk.name])
        self.model.forget_reads()
        self._bury()
        if self.failure is not None:
            raise self.failure
        return images

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self.failure = self.failure or error

    def _check_disk(self, name: str, image: bytes) -> None:
        disk = next(disk for disk in self.rig.disks if disk.name == name)
        self._try(lambda: self.rig.check_disk(disk, image, self.has_booted))

    def _bury(self) -> None:
        """Let every coroutine of this life end, on disks that do nothing any more."""
        loop = self.loop
        for disk in self.disks.values():
            disk.cut_power()
        loop.cut_at = None
        loop.watch_nothing()
        loop.deadline_s = float("inf")
        loop.steps_max = loop.steps + BURIAL_STEPS_MAX
        # What ends may start something new: until there is nothing more.
        while tasks := asyncio.all_tasks(loop):
            for task in tasks:
                task._log_destroy_pending = False  # type: ignore[attr-defined]
                task.cancel()
            # The end of `_live` may be scheduled already, and would stop us instead.
            loop.call_soon(loop.stop)
            loop.run_forever()
            tasks = {task for task in tasks if not task.done()}
            try:
                if tasks:
                    loop.run_until_complete(asyncio.wait(tasks))
            except Stuck:
                break  # a dead machine owes nothing to anybody
        loop.close()

    async def _live(self) -> None:
        await self._boot()
        clients = [self._client(nr) for nr in range(self.plan.nr_clients)]
        self.clients.extend(clients)
        operator = None
        if self.plan.operates:
            operator = self.loop.create_task(self._operate())
        await self._verify()
        running = [self._spawn(client.run()) for client in clients]
        if self.plan.shutdown_after_s is None:
            await asyncio.gather(*running)
            await asyncio.sleep(self.plan.afterwards_s)
            if self.plan.afterwards_s:
                await self._verify_again()
        else:
            await asyncio.sleep(self.plan.shutdown_after_s)
        await self._shut_down(operator)

    def _spawn(self, steps: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        return self.loop.create_task(steps)

    def _client(self, nr: int) -> Client:
        rng = random.Random(f"{self._seed} client {nr}")
        habits = Habits.draw(rng)
        return Client(self, f"client {nr}", rng, habits, self.plan.nr_requests)

    async def _boot(self) -> None:
        rng = self._random
        self.registry = Registry(DeviceTable(dict(self.disks)), clock=self.clock)
        self.verbs = Verbs(self.registry)
        self.listener = Listener(
            self.registry, limits=draw_limits(rng), clock=self.clock
        )
        if rng.random() < 0.5:
            await self.registry.create("d", self.rig.table)
            self._listen()
        else:
            # As the porcelain does it: clients may attach before the first bio may go.
            device = await self.registry.create("d", None)
            await self.registry.load("d", self.rig.table)
            await device.activate()
            self._listen()
            await device.resume()
        self.has_booted = True
        self.note("booted")

    def _listen(self) -> None:
        self.listener.start_socket(cast(socket.socket, self.network.listener()))

    async def _verify(self) -> None:
        """Read the whole disk, and hold it against all that the crash may have left."""
        rng = random.Random(f"{self._seed} verify")
        client = Client(self, "verifier", rng, Habits.draw(rng), 0)
        self.clients.append(client)
        if not await client.connect():
            raise AssertionError("no connection after boot")
        offsets = list(range(0, self.model.size, VERIFY_BYTES))
        rng.shuffle(offsets)
        for offset in offsets:
            length = min(VERIFY_BYTES, self.model.size - offset)
            data = await client.read(offset, length)
            assert data is not None, "connection lost while verifying"
            self.model.check_survivor_at(offset, data)
        await client.disconnect()
        self.clients.remove(client)
        self.note("verified")

    async def _verify_again(self) -> None:
        """Read the whole disk, and hold it against the newest values."""
        rng = random.Random(f"{self._seed} again")
        client = Client(self, "reader", rng, Habits.draw(rng), 0)
        self.clients.append(client)
        assert await client.connect()
        for offset in range(0, self.model.size, VERIFY_BYTES):
            length = min(VERIFY_BYTES, self.model.size - offset)
            running = self.model.start_read(offset, length)
            data = await client.read(offset, length)
            assert data is not None
            self.model.drop_read(running)
            self.model.check_piece(running, offset, data)
        await client.disconnect()

    async def _shut_down(self, operator: "asyncio.Task[None] | None") -> None:
        """As the daemon ends."""
        self.note("shutdown")
        if self.plan.cut_in_shutdown is not None and not self.is_over:
            self.loop.cut_at = self.loop.steps + self.plan.cut_in_shutdown
        self.is_stopping = True
        await self.listener.close(GRACE_S)
        promised = self.model.start_flush()
        flushes = not self._is_unflushed
        await self.registry.close()
        self.model.end_flush(promised, ok=flushes)
        if operator is not None:
            await operator

    # ---- the operator ----

    async def _operate(self) -> None:
        """Say and ask all that may be said and asked, at any time."""
        rng = random.Random(f"{self._seed} operator")
        pause_s = rng.choice((0.001, 0.1, 2.0))
        deeds = (self._status, self._message, self._suspend, self._reload, self._look)
        while not self.is_stopping:
            await asyncio.sleep(rng.random() * pause_s)
            if self._are_clients_done():
                return
            deed = rng.choice(deeds)
            self.note("operator", deed.__name__)
            try:
                await deed(rng)
            except NbdTargetError:
                if not self.is_stopping:
                    raise

    def _are_clients_done(self) -> bool:
        return all(c.left <= 0 and not c.is_connected for c in self.clients)

    async def _status(self, rng: random.Random) -> None:
        answer = await self.verbs.status(m.Status(noflush=rng.random() < 0.3))
        self.rig.check_status(
            [line.params for device in answer.devices for line in device.lines]
        )

    async def _message(self, rng: random.Random) -> None:
        if self.rig.messages:
            sector, words = rng.choice(self.rig.messages)
            await self.verbs.message(m.Message("d", sector, words))

    async def _suspend(self, rng: random.Random) -> None:
        noflush = rng.random() < 0.2
        self._is_unflushed = noflush
        await self.verbs.suspend(m.Suspend("d", noflush=noflush))
        self.note("operator", "suspended", noflush)
        await asyncio.sleep(rng.choice((0.0, 0.001, 1.0)))
        await self.verbs.resume(m.Resume("d"))
        self._is_unflushed = False

    async def _reload(self, rng: random.Random) -> None:
        await self.verbs.load(m.Load("d", self.rig.table))
        await asyncio.sleep(rng.choice((0.0, 0.1)))
        if rng.random() < 0.1:
            await self.verbs.clear(m.Clear("d"))
        else:
            await self.verbs.resume(m.Resume("d"))

    async def _look(self, rng: random.Random) -> None:
        await self.verbs.table(m.Table(inactive=rng.random() < 0.3))
        info = await self.verbs.info(m.Info())
        assert not any(device.failed for device in info.devices)
