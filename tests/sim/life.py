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
machine, is in `failure`: an oracle's Violation, an uncaught exception, a log
line of level ERROR.

In some lives a disk goes bad (`Fault`), in some an operator cuts the power of a `powercut` device
below (an *outage*). Then, and only then, requests and verbs may fail, and ERROR lines may be
logged (`may_fail`).
"""

import asyncio
import random
import socket
from collections import Counter
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Final, cast

from nbdtarget.bio import FUA, OP_FLUSH, OP_NAMES, OP_READ, Bio
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.permissions import OVERWRITE, Permission
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm.registry import Registry
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.targets.powercut.volatile_cache import BORDERS, Fate
from tests.sim.backend import RECOVERY_S, Backend, BackendTable, Trouble
from tests.sim.cache_watch import CacheWatch
from tests.sim.client import Client, Habits
from tests.sim.disks import LATENCIES, SimDisk
from tests.sim.faults import Fault, stands_on_latched
from tests.sim.hydration import HydrationModel
from tests.sim.loop import PowerCut, SimLoop, SimLoopClock, Stuck
from tests.sim.model import SECTOR, ClientModel
from tests.sim.operator import Operator
from tests.sim.rigs import Rig, Role
from tests.sim.sockets import SimNetwork, SimSocket
from tests.sim.stop import Stop
from tests.support.devices import CrashDevice

__all__ = ["Life", "Plan"]

LIFE_S_MAX: Final = 24 * 3600.0  # simulated; whatever waits longer is stuck
GRACE_S: Final = 10.0
BURIAL_STEPS_MAX: Final = 20_000
VERIFY_BYTES: Final = 16 * SECTOR


@dataclass(frozen=True)
class Plan:
    """The events of a life. None: the event does not happen."""

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
        """Return a plan without clients, which only reads the disk."""
        return cls(0, 0, None, None, None, None, None, Fate.DROP, 0.0, False)


def _draw_nth(rng: random.Random) -> tuple[int, int]:
    """Draw the number of an event, more often an early one, and a number of steps after it."""
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
        payload_step=4096,
        range_slice=4096,
        turn_us=0,
        turn_bytes_max=8 << 10 if small else 1 << 20,
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
        is_uncached: it begins without the cache that the rig has.
        fault: what goes wrong with a disk, if anything.

    Attributes:
        is_uncached: the origin alone is the disk, certainly.
        has_booted, is_booted: this machine, in any life; in this one.
        is_stopping: clients may be refused.
        nr_outages: beginnings and ends of them: a request that has seen one may fail.
        owes_flush_error: one FLUSH of each connection may fail, for what a table that is gone
            has lost.
        flushes_fail: one has failed on a disk that has latched: so will each that is sent.
        is_hurt: a server of a disk that is written to has gone in this life: what was not
            flushed may be lost, which is told once to each connection.
        nr_departures: how often a backend has gone, or begun to hang.
        failure: the first thing that went wrong.
        counts: what happened in the cache, if there is one.
    """

    def __init__(
        self,
        rig: Rig,
        model: ClientModel,
        plan: Plan,
        seed: str,
        images: dict[str, bytes],
        note: Callable[..., None],
        hydration: HydrationModel,
        *,
        fault: Fault | None = None,
        now_s: float = 0.0,
        has_booted: bool = False,
        is_uncached: bool = False,
        disk_type: type[SimDisk] = SimDisk,
    ) -> None:
        self.rig = rig
        self.is_uncached = is_uncached
        self.table = rig.uncached if is_uncached else rig.table
        self.model = model
        self.hydration = hydration
        self.counts: Counter[str] = Counter()
        self.plan = plan
        self.fault = fault
        self.has_booted = has_booted
        self.is_booted = False
        self.suspended: set[str] = set()
        self.is_stopping = False
        self.is_over = False
        self.was_cut = False
        self.nr_outages = 0
        self.owes_flush_error = False
        self.flushes_fail = False
        self.ended_s = now_s
        self.failure: BaseException | None = None
        self.nr_requests = 0
        self.clients: list[Client] = []
        self._seed = seed
        self._random = rng = random.Random(seed)
        self._note = note
        self._stamp = 0
        self._limbo: list[tuple[Client, SimSocket, list[Any]]] = []
        self._is_faulty = False
        self._is_cornered = False  # see `corner`
        self._is_out = (
            False  # a powercut device is off, or what stood on it is not started anew
        )
        self.is_cutting = (
            asyncio.Lock()
        )  # held by the operator: the machine does not stop now
        self._nr_durable = 0
        self._nr_promised = 0
        self.loop = SimLoop(rng.randrange(1 << 32), now_s=now_s)
        self.loop.set_exception_handler(self._escaped)
        self.loop.deadline_s = now_s + LIFE_S_MAX
        self.loop.cut_at = plan.cut_step
        self.clock = SimLoopClock(self.loop)
        self.network = self._make_network()
        self.disks = self._make_disks(images, disk_type)
        self.backends = self._make_backends()
        self.loop.backends = self.backends
        self.is_hurt = False
        self.nr_departures = 0
        self._nr_away = 0  # backends
        self._nr_back = 0  # times that one has come back
        self._is_recovering = False
        self._cache = None if rig.backends else CacheWatch.maybe_of(self)

    def _make_network(self) -> SimNetwork:
        rng = self._random
        return SimNetwork(
            self.loop,
            random.Random(rng.randrange(1 << 32)),
            partial=rng.choice((0.0, 0.2, 0.8)),
            again=rng.choice((0.0, 0.1)),
            capacity=rng.choice((300, 4096, 64 << 10)),
            family=rng.choice((socket.AF_UNIX, socket.AF_INET)),
        )

    def _make_disks(
        self, images: dict[str, bytes], disk_type: type[SimDisk]
    ) -> dict[str, SimDisk]:
        rng, disks = self._random, {}
        for disk in self.rig.disks:
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
            disks[disk.name] = device
            self.note("boot", disk.name, latency)
        return disks

    def _make_backends(self) -> dict[str, Backend]:
        """Return the backends by host name."""
        return {
            name[1:]: Backend(
                self.network,
                self.disks[name],
                random.Random(f"{self._seed} backend {name}"),
                self.loop,
            )
            for name in self.rig.backends
        }

    # ---- what may go wrong ----

    @property
    def may_fail(self) -> bool:
        """Whether requests and verbs may fail, and ERROR lines may be logged."""
        return (
            self._is_faulty or self._is_cornered or self._is_out or self._is_recovering
        )

    def backend_goes(self, *, is_written: bool) -> None:
        """A backend is about to go away."""
        self.nr_outages += 1
        self._nr_away += 1
        self.nr_departures += 1
        self._is_recovering = True
        if is_written:
            self.is_hurt = True
            self.model.become_lossy()
            self.hydration.forget()
            for client in self.clients:
                client.forget_losses()

    def backend_is_back(self) -> None:
        """A backend is back; every device must connect to it within RECOVERY_S."""
        self._nr_away -= 1
        self._nr_back += 1
        nr_back = self._nr_back

        def recovered() -> None:
            if self._nr_away or nr_back != self._nr_back:
                return
            if self.is_hurt and self.rig.has_metadata:
                return  # a commit may have failed: until the table is loaded again
            self.recovered()

        self.loop.call_later(RECOVERY_S, recovered)

    @property
    def are_backends_well(self) -> bool:
        return not self._nr_away and not any(b.is_hung for b in self.backends.values())

    def recovered(self) -> None:
        """From here on nothing may fail, but the FLUSH that tells a client of a loss."""
        if self._is_recovering:
            self.note("recovered")
            self.nr_outages += 1
            # A suspend whose flush failed counts as a loss, too, whatever had been told before.
            for client in self.clients:
                client.forget_losses()
            self._is_recovering = False

    @property
    def is_slow(self) -> bool:
        """A disk takes so long that a suspend may be given up."""
        return self.fault is not None and self.fault.lie is None

    def begin_outage(self, *, loses: bool) -> None:
        """A powercut device is about to be cut. With `loses`, clients continue on the same disk after it."""
        self.nr_outages += 1
        self._is_out = True
        if loses:
            self.model.lose_unflushed()
        else:
            self.model.become_lossy()
        if self.rig.starts_anew:
            self.hydration.forget()

    def end_outage(self) -> None:
        """The power is back, and whatever had to be was started anew."""
        self.nr_outages += 1
        self._is_out = False
        if self.rig.starts_anew:
            self.hydration.trust_again()

    def table_has_lost(self) -> None:
        """A table was swapped away with what was not flushed: each connection is told once."""
        self.owes_flush_error = True
        for client in self.clients:
            client.forget_losses()

    def flush_failed(self) -> None:
        """A client was told so."""
        if self.nr_outages:
            return  # it may be for that, and a table that was wiped flushes nothing
        if self._is_faulty and stands_on_latched(self.registry, self.disks):
            self.flushes_fail = True

    def _break_disk(self) -> None:
        fault = self.fault
        assert fault is not None
        self.note("fault", fault.disk, fault.lie)
        # One that is slow behind a server may take longer than our client waits.
        self._is_faulty = fault.lie is not None or fault.disk in self.rig.backends
        self.disks[fault.disk].lie = fault.lie_with(self.clock)

    def watch_cache(self) -> None:
        """A table was loaded, which may have a cache."""
        if self._cache is not None:
            self._cache.watch_tables(self.registry)

    # ---- what happens ----

    def note(self, who: str, *what: object) -> None:
        if not self.is_over:
            self._note(self.loop.time(), self.loop.steps, who, *what)

    def started(self, device: CrashDevice, bio: Bio) -> None:
        """A disk was given a bio; `finished` is what counts."""

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        """A disk has carried out a bio."""
        self.note(device.name, OP_NAMES[bio.op], bio.offset, bio.length, bio.flags)
        if errno:
            self._disk_failed(device, bio)
        elif bio.op == OP_FLUSH or (bio.op != OP_READ and bio.flags & FUA):
            self._nr_durable += 1
            self._cut_after(self.plan.cut_at_durable, self._nr_durable)

    def _disk_failed(self, device: CrashDevice, bio: Bio) -> None:
        """Expect uncommitted regions of a clone to be taken back, because their commit may fail."""
        roles = {disk.name: disk.role for disk in self.rig.disks}
        if (
            bio.op != OP_READ
            and self.rig.has_metadata
            and roles[device.name] is not Role.SOURCE
            and not self.model.is_lossy
        ):
            self.model.become_lossy()
            self.hydration.forget()

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
        """Whether no write to the range is in flight, nor of a client that has not come back."""
        if any(op.overlaps(offset, length) for c in self.clients for op in c.changes()):
            return False
        self._limbo = [
            entry
            for entry in self._limbo
            if not entry[0].is_attached and self._is_served(entry[1])
        ]
        if any(op.overlaps(offset, length) for *_, ops in self._limbo for op in ops):
            return False
        edges = offset, offset + length
        return all(self.model.is_certain_at(edge) for edge in edges)

    def put_in_limbo(self, client: Client, sock: SimSocket, changes: list[Any]) -> None:
        """Note writes of a client whose connection was lost: until the client is back, they may still be carried out."""
        if changes:
            assert sock.peer is not None
            self._limbo.append((client, sock.peer, changes))

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
        if self._cache is not None:
            self.counts += self._cache.counts
            if self.failure is None:
                self._try(self._cache.look)
        self.is_over = True
        self.ended_s = self.loop.time()
        images = {
            disk.name: disk.crash(self._random.randrange(1 << 32), fate)
            for disk in self.disks.values()
        }
        if self.failure is None:
            for disk in self.rig.disks:
                self._check_disk(disk.name, images[disk.name])
        self.model.power_off()
        self._bury()
        if self.failure is not None:
            raise self.failure
        return images

    def repaired(
        self, images: dict[str, bytes], fail: Callable[[BaseException], None]
    ) -> dict[str, bytes]:
        """Return the images for the next life. Only metadata on a bad disk may need an offline tool."""
        fault = self.fault
        repaired = {}
        for disk in self.rig.disks:
            image = images[disk.name]
            repaired[disk.name] = mended = self.rig.repaired(disk, image)
            is_bad = fault is not None and fault.disk == disk.name and fault.lie
            if mended != image and not is_bad:
                fail(AssertionError(f"{disk.name}: needs_check, and it is sound"))
        return repaired

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
                # A dead machine owes nothing. What waits for ever must not wake in another life.
                loop.close_what_waits()
                break
        loop.close()

    async def _live(self) -> None:
        if not await self._boot():
            return
        clients = [self._client(nr) for nr in range(self.plan.nr_clients)]
        self.clients.extend(clients)
        operator = None
        if self.plan.operates:
            operator = self.loop.create_task(self._operator.run())
            operator.add_done_callback(self._operator_ended)
        await self._verify()
        if self.backends and self.plan.nr_clients:
            trouble = Trouble(self, random.Random(f"{self._seed} trouble"))
            self._spawn(trouble.run()).add_done_callback(self._operator_ended)
        running = [self._spawn(client.run()) for client in clients]
        if self.plan.shutdown_after_s is None:
            await asyncio.gather(*running)
            await asyncio.sleep(self.plan.afterwards_s)
            if self._cache is not None:
                await self._be_quiet(self._cache, operator)
            if self.plan.afterwards_s:
                await self._verify_again()
        else:
            await asyncio.sleep(self.plan.shutdown_after_s)
        await self._shut_down(operator)

    async def _be_quiet(
        self, cache: CacheWatch, operator: "asyncio.Task[None] | None"
    ) -> None:
        """Check that an idle cache does no I/O, after all clients are done."""
        if operator is not None:
            await asyncio.wait([operator], timeout=self.plan.afterwards_s)
        if not self.may_fail and (operator is None or operator.done()):
            await cache.be_quiet()

    def _operator_ended(self, operator: "asyncio.Task[None]") -> None:
        if not operator.cancelled() and (error := operator.exception()) is not None:
            self.fail(error)

    def _spawn(self, steps: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        return self.loop.create_task(steps)

    def _client(self, nr: int) -> Client:
        rng = random.Random(f"{self._seed} client {nr}")
        habits = Habits.draw(rng)
        return Client(self, f"client {nr}", rng, habits, self.plan.nr_requests)

    async def _boot(self) -> bool:
        """Come up; False if a bad disk does not let us."""
        self.hydration.power_on()
        fault = self.fault
        if fault is not None and fault.after_s is None:
            self._break_disk()
        self.registry = Registry(BackendTable(dict(self.disks)), clock=self.clock)
        self.verbs = Verbs(self.registry)
        self.listener = Listener(
            self.registry,
            limits=draw_limits(self._random),
            clock=self.clock,
            hang_up_events=lambda sock: cast(SimSocket, sock).hang_up_events(),
        )
        self._operator = Operator(self, random.Random(f"{self._seed} operator"))
        self.suspended = self._operator.unflushed
        try:
            await self._create_devices()
        except NbdTargetError as error:
            if not self.may_fail:
                raise
            self.note("no boot", error)
            self.is_stopping = True
            await self.listener.close(GRACE_S)
            await self.registry.close()
            return False
        self.has_booted = self.is_booted = True
        self.note("booted")
        if fault is not None and fault.after_s is not None:
            self.loop.call_later(fault.after_s, self._break_disk)
        return True

    async def _create_devices(self) -> None:
        # The disks hold what the model says before their metadata is made. After that no start may
        # need a word that a person has to say.
        allowed: frozenset[Permission] = frozenset()
        if not self.has_booted:
            allowed = frozenset((OVERWRITE,))
        for name, table in self.rig.below:
            await self.registry.create(name, table, permissions=allowed)
        if self._random.random() < 0.5:
            await self.registry.create("d", self.table, permissions=allowed)
            self.watch_cache()
            self._listen()
        else:
            # As the porcelain does it: clients may attach before the first bio may go.
            device = await self.registry.create("d", None)
            await self.registry.load("d", self.table, permissions=allowed)
            self.watch_cache()
            await device.activate()
            self._listen()
            await device.resume()

    def _listen(self) -> None:
        self.listener.start_socket(cast(socket.socket, self.network.listener()))

    async def _verify(self) -> None:
        """Read the whole disk, and check it against all that the crash may have left."""
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
            if data or not self.may_fail:
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
            self.model.check_piece(running, offset, data)  # nothing, if it may fail
        await client.disconnect()

    async def _shut_down(self, operator: "asyncio.Task[None] | None") -> None:
        """As the daemon ends; see `tests.sim.stop`."""
        stop = Stop(self, random.Random(f"{self._seed} stop"))
        await stop.prepare()
        self.note("shutdown")
        # A cut would let few stops over what hangs see their end.
        if self.plan.cut_in_shutdown is not None and not stop.hangs:
            self.loop.cut_at = self.loop.steps + self.plan.cut_in_shutdown
        self.is_stopping = True
        if await stop.run() and operator is not None:
            await operator

    def corner(self) -> None:
        """Begin a stop in which some requests may get no answer."""
        self.nr_outages += 1
        self._is_cornered = True

    @property
    def is_sound(self) -> bool:
        """Whether a stop that ends makes everything durable."""
        return not (self._is_faulty or self.owes_flush_error or self.is_hurt)

    def are_clients_done(self) -> bool:
        """Whether no client will send another request."""
        return all(c.left <= 0 and not c.is_connected for c in self.clients)
