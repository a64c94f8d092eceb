# SPDX-License-Identifier: Apache-2.0
"""One image, many machines: what a fleet of clones asks of a store, and how long it takes, in simulated time.

    python -m scripts.fleet_sim [--clones N]... [--image-mib 256] [--trace FILE] [--latency-ms 30] [--gbit-s 10]
                                [--requests-s 5500] [--dollars-per-million 0.4] [--output FILE]

The clones, their hydration, the cache and the reading of remote images are the real code (`nbdtarget.targets`, `nbdtarget.devices.ranged`), on a loop whose
time jumps from event to event. What is modelled:

    store       `--latency-ms` to the first byte; all answers share `--gbit-s`, and one has at most 90 MB/s; more than
                `--requests-s` requests a second are refused with "slow down"
    machine     a network card of 10 Gbit/s and a disk of 500 MB/s; it boots by reading what a Debian 12 read (`TRACE`, recorded with
                `clone --record-trace`, with its offsets fitted to the image), one read after the other, with `BOOT_CPU_S` of its own work
                in between
    cache       one machine more, with the image's blocks in a cache of its own; the others read from it, 0.3 ms away

All machines are started at the same moment, which is the worst case. Each number of clones is run in four ways: from the store and
from the cache, which is cold, each with and without the trace of an earlier boot (`--hydrate-order`).

`first read` is that of the slowest machine, as are `booted` and `hydrated`. `requests` and `MiB` are what the store was asked for, for each clone. The
cost is that of the requests; what a provider charges for bytes that leave it depends on where the fleet is.

*Time.* Each run is in a process of its own, as many at a time as there are processors. A thousand clones take some minutes a run.

*Memory.* The image is nothing but zeroes, so all buffers that hold parts of it are the same piece of memory (`one_memory`): a thousand clones, each with
32 MiB in flight and as much in its cache of pieces, would need more than a machine has. Nothing in the simulation looks at the bytes.
"""

import argparse
import asyncio
import contextlib
import json
import logging
import random
import sys
from collections.abc import Hashable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final
from unittest.mock import patch

from rich.console import Console
from rich.table import Table

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.permissions import OVERWRITE
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.devices.ranged import pieces
from nbdtarget.devices.ranged.device import RangedDevice
from nbdtarget.devices.ranged.options import (
    REMOTE_COPY_BYTES,
    REMOTE_IN_FLIGHT_BYTES,
    SourceOptions,
)
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget.devices.ranged.store import SourceAway, Store, Take
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.porcelain.trace_file import read_trace
from nbdtarget.targets import copier
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.clone.trace import grouped
from tests.sim.loop import SimLoop, SimLoopClock

__all__ = ["TRACE", "Fleet", "Model", "Result", "fitted", "main", "run"]

MIB: Final = 1 << 20
REGION: Final = 64 << 10
SLICE: Final = 512 << 10
CONNECTION_BYTES_S: Final = 90e6
CARD_BYTES_S: Final = 1.25e9
DISK_BYTES_S: Final = 500e6
CACHE_LATENCY_S: Final = 0.0003
BOOT_CPU_S: Final = 5.0
CACHE_BLOCK: Final = 256 << 10
TRACE: Final = Path(__file__).parents[1] / "tests/support/debian-boot.trace"
WAYS: Final = ("store", "store, traced", "cache", "cache, traced")
_ZEROES: Final = memoryview(bytes(SLICE))
_MEMORY: Final = memoryview(bytearray(8 * MIB))  # always zero: see *Memory*

Trace = list[tuple[int, int]]


@dataclass(frozen=True)
class Model:
    """The properties of a store. Bytes and seconds."""

    image_bytes: int = 256 * MIB
    latency_s: float = 0.03
    bytes_per_s: float = 1.25e9
    requests_per_s: float = 5500.0
    dollars_per_request: float = 0.4e-6


@dataclass(frozen=True)
class Result:
    """One run. Times are those of the slowest machine, in seconds; requests and MiB are for each clone."""

    way: str
    nr_clones: int
    requests: float
    refused: float
    mib: float
    first_read_s: float
    booted_s: float
    hydrated_s: float
    dollars: float


class Link:
    """A link that several streams share: they go through one after the other, slice by slice."""

    def __init__(self, bytes_per_s: float) -> None:
        self._bytes_per_s = bytes_per_s
        self._free_s = 0.0

    def ends_s(self, length: int) -> float:
        """Take the link for `length` bytes; return when they have gone through."""
        now_s = asyncio.get_running_loop().time()
        self._free_s = max(now_s, self._free_s) + length / self._bytes_per_s
        return self._free_s


class StoreSide:
    """The store itself, which all clones ask.

    Attributes: requests, refused, bytes_sent: so far.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.link = Link(model.bytes_per_s)
        self.requests = 0
        self.refused = 0
        self.bytes_sent = 0
        self._tokens = model.requests_per_s
        self._counted_s = 0.0

    def admit(self) -> bool:
        """Count a request; return whether it is answered."""
        now_s = asyncio.get_running_loop().time()
        rate = self.model.requests_per_s
        self._tokens = min(rate, self._tokens + (now_s - self._counted_s) * rate)
        self._counted_s = now_s
        self.requests += 1
        if self._tokens < 1:
            self.refused += 1
            return False
        self._tokens -= 1
        return True


class ModelStore:
    """How one machine reads from the store. Implements `nbdtarget.devices.ranged.store.Store`."""

    def __init__(self, side: StoreSide) -> None:
        self._side = side
        self._card = Link(CARD_BYTES_S)
        self.pin = Pin(side.model.image_bytes, '"one"')

    async def open(self, take: Take) -> Pin:
        await self._send(0, 256 << 10, take)
        return self.pin

    async def get(
        self, begin: int, end: int, pin: Pin, take: Take, *, is_urgent: bool
    ) -> None:
        await self._send(begin, end, take)

    async def _send(self, begin: int, end: int, take: Take) -> None:
        side, loop = self._side, asyncio.get_running_loop()
        admitted = side.admit()
        await asyncio.sleep(side.model.latency_s)
        if not admitted:
            raise SourceAway("status 503", is_overload=True)
        for at in range(begin, end, SLICE):
            length = min(SLICE, end - at)
            own_s = loop.time() + length / CONNECTION_BYTES_S
            due_s = max(side.link.ends_s(length), self._card.ends_s(length), own_s)
            await asyncio.sleep(due_s - loop.time())
            side.bytes_sent += length
            take(_ZEROES[:length])

    async def renew(self) -> bool:
        return False

    def elsewhere(self, name: str) -> tuple[Store, str]:
        raise ResolveError(name, "there is one store")

    async def close(self) -> None:
        """Nothing is open."""


class LocalDisk(Device):
    """The disk of a machine: it takes its time for writes, and forgets them. Its reads find zeroes, and so they are in the buffer already."""

    can_discard = True

    def __init__(self, name: str, size: int) -> None:
        super().__init__(name, size)
        self._link = Link(DISK_BYTES_S)

    def submit(self, bio: Bio) -> None:
        if status := self.check_bounds(bio):
            bio.end(status)
            return
        if bio.op != OP_WRITE:
            bio.end(0)
            return
        bio.own()
        loop = asyncio.get_running_loop()
        loop.call_at(self._link.ends_s(bio.length), bio.end, 0)

    async def close(self) -> None:
        """Nothing is open."""


class FarDisk(Device):
    """A disk of the cache machine, over the network: its reads take the way of both network cards."""

    def __init__(self, name: str, inner: Device, card_there: Link) -> None:
        super().__init__(name, inner.size, read_only=True)
        self._inner = inner
        self._there = card_there
        self._here = Link(CARD_BYTES_S)

    def submit(self, bio: Bio) -> None:
        if bio.op != OP_READ:
            bio.end(self.check_bounds(bio))
            return
        bio.own()
        loop = asyncio.get_running_loop()

        def ended(child: Bio) -> None:
            due_s = max(self._there.ends_s(bio.length), self._here.ends_s(bio.length))
            loop.call_at(due_s + CACHE_LATENCY_S, bio.end, child.status)

        child = Bio(OP_READ, bio.offset, bio.length, bio.payload, 0, ended)
        self._inner.submit(child)

    async def close(self) -> None:
        """The cache machine closes its own disks."""


class Opener:
    """Names of the fleet's devices: store:NR, far:NR, disk:NR, fast:NAME, memory:NAME:SIZE."""

    def __init__(self, model: Model) -> None:
        self.side = StoreSide(model)
        self._model = model
        self._card = Link(CARD_BYTES_S)
        self.cached: MappedDevice | None = None

    def identity(self, name: str) -> Hashable:
        return name

    def may_create(self, name: str) -> bool:
        return False

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        size = self._model.image_bytes
        match name.split(":"):
            case ["store", nr]:
                store = ModelStore(self.side)
                head = bytearray()
                pin = await store.open(head.extend)
                jitter = random.Random(int(nr))
                options = SourceOptions()
                return RangedDevice(
                    name, name, store, pin, options, head=head, jitter=jitter
                )
            case ["far", _]:
                assert self.cached is not None
                return FarDisk(name, self.cached, self._card)
            case ["disk" | "fast", _]:
                return LocalDisk(name, size)
            case ["memory", _, bytes_]:
                return MemoryDevice(int(bytes_), name=name)
        raise ResolveError(name, "no such device")

    async def create_device(self, name: str, size: int) -> Device:
        raise ResolveError(name, "cannot be created")

    async def remove_created(self, name: str) -> None:
        raise AssertionError(name)


class Fleet:
    """All machines of one run."""

    def __init__(self, loop: SimLoop, model: Model, trace: Trace, way: str) -> None:
        self._model = model
        self._trace = trace
        self._way = way
        self._is_cached = way.startswith("cache")
        self._opener = Opener(model)
        self._registry = Registry(self._opener, clock=SimLoopClock(loop))

    async def run(self, nr_clones: int) -> Result:
        loop = asyncio.get_running_loop()
        if self._is_cached:
            await self._start_cache()
        begun_s = loop.time()
        times = await asyncio.gather(*(self._machine(nr) for nr in range(nr_clones)))
        side = self._opener.side
        await self._registry.close()
        slowest = [max(column) - begun_s for column in zip(*times, strict=True)]
        first_s, booted_s, hydrated_s = slowest
        return Result(
            self._way,
            nr_clones,
            side.requests / nr_clones,
            side.refused / nr_clones,
            side.bytes_sent / MIB / nr_clones,
            first_s,
            booted_s,
            hydrated_s,
            side.requests * self._model.dollars_per_request,
        )

    async def _start_cache(self) -> None:
        size = self._model.image_bytes
        line = (
            f"0 {size // 512} cache memory:cm:{64 * MIB} fast:cache store:0"
            f" {CACHE_BLOCK // 512} 1 writethrough smq 2 migration_threshold {128 * MIB // 512}"
        )
        self._opener.cached = await self._registry.create("cache", line, read_only=True)

    async def _machine(self, nr: int) -> tuple[float, float, float]:
        """Start one machine; return when it had its first read, was booted and was hydrated."""
        source = f"far:{nr}" if self._is_cached else f"store:{nr}"
        size = self._model.image_bytes
        name = f"c{nr}"
        device = await self._registry.create(
            name,
            f"0 {size // 512} clone memory:m{nr}:{MIB} disk:{nr} {source} {REGION // 512} 0"
            f" 4 hydration_threshold {REMOTE_IN_FLIGHT_BYTES // REGION} hydration_batch_size {REMOTE_COPY_BYTES // REGION}",
            permissions=frozenset(
                {OVERWRITE}
            ),  # there is no need to look for data on a new disk
        )
        if self._way.endswith("traced"):
            assert device.active is not None
            target = device.active.targets[0]
            assert isinstance(target, CloneTarget)
            target.hydrate_first(grouped(self._trace))
        booting = asyncio.ensure_future(self._boot(device))
        hydrated_s = await self._hydrated(device)
        first_s, booted_s = await booting
        await self._registry.remove(name)
        return first_s, booted_s, hydrated_s

    async def _boot(self, device: MappedDevice) -> tuple[float, float]:
        loop = asyncio.get_running_loop()
        think_s = BOOT_CPU_S / max(1, len(self._trace))
        first_s = 0.0
        for begin, end in self._trace:
            await device.read(begin, end - begin)
            first_s = first_s or loop.time()
            await asyncio.sleep(think_s)
        return first_s, loop.time()

    async def _hydrated(self, device: MappedDevice) -> float:
        while True:
            event_nr = device.event_nr
            ((_, fields),) = await device.status_by_name(noflush=True)
            if fields["hydrated_durably"]:
                return asyncio.get_running_loop().time()
            await device.events.wait(event_nr)


def fitted(trace: Trace, size: int) -> Trace:
    """Return a trace of an image of another size: the same reads in the same order, nearer to or farther from each other."""
    span = max(end for _, end in trace)
    found = []
    for begin, end in trace:
        length = min(end - begin, size)
        at = min(begin * size // span // 4096 * 4096, size - length)
        found.append((at, at + length))
    return found


@contextlib.contextmanager
def one_memory() -> Iterator[None]:
    """Give the same memory to all buffers of copies and of pieces."""

    def zeroes(length: int) -> memoryview:
        return _MEMORY[:length]

    with (
        patch.object(copier, "new_buffer", zeroes),
        patch.object(pieces, "new_buffer", zeroes),
    ):
        yield


def run(model: Model, trace: Trace, way: str, nr_clones: int) -> Result:
    """Run one fleet in simulated time."""
    loop = SimLoop()
    loop.steps_max = 1 << 40
    try:
        with one_memory():
            fleet = Fleet(loop, model, trace, way)
            return loop.run_until_complete(fleet.run(nr_clones))
    finally:
        loop.close()


def table(results: Sequence[Result], model: Model) -> Table:
    shown = Table(
        title=f"an image of {model.image_bytes // MIB} MiB; requests and MiB for each clone, times of the slowest"
    )
    for column in ("from", "clones", "requests", "refused", "MiB", "first read s", "booted s", "hydrated s", "requests $"):  # fmt: skip
        shown.add_column(column, justify="right")
    for each in results:
        shown.add_row(
            each.way,
            str(each.nr_clones),
            f"{each.requests:.1f}",
            f"{each.refused:.1f}",
            f"{each.mib:.1f}",
            f"{each.first_read_s:.3f}",
            f"{each.booted_s:.2f}",
            f"{each.hydrated_s:.2f}",
            f"{each.dollars:.4f}",
        )
    return shown


def _be_quiet() -> None:
    """Log errors only, because a thousand clones would log too much."""
    logging.disable(logging.WARNING)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="A fleet of clones, simulated.")
    parser.add_argument("--clones", type=int, action="append")
    parser.add_argument("--image-mib", type=int, default=256)
    parser.add_argument("--trace", default=str(TRACE), help="of a boot")
    parser.add_argument("--latency-ms", type=float, default=30.0)
    parser.add_argument("--gbit-s", type=float, default=10.0)
    parser.add_argument("--requests-s", type=float, default=5500.0)
    parser.add_argument("--dollars-per-million", type=float, default=0.4)
    parser.add_argument("--output", help="write a JSON report")
    options = parser.parse_args(argv)
    model = Model(
        options.image_mib * MIB,
        options.latency_ms / 1000,
        options.gbit_s * 1e9 / 8,
        options.requests_s,
        options.dollars_per_million / 1e6,
    )
    trace = fitted(read_trace(options.trace), model.image_bytes)
    runs = [
        (way, nr_clones)
        for nr_clones in options.clones or (1, 10, 100, 1000)
        for way in WAYS
    ]
    results = []
    with ProcessPoolExecutor(initializer=_be_quiet) as pool:
        under_way = [pool.submit(run, model, trace, *each) for each in runs]
        for (way, nr_clones), future in zip(runs, under_way, strict=True):
            results.append(future.result())
            print(f"{way}, {nr_clones}: done", file=sys.stderr)
    Console(width=120).print(table(results, model))
    if options.output:
        report = {"model": asdict(model), "results": [asdict(r) for r in results]}
        Path(options.output).write_text(json.dumps(report, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
