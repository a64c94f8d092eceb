# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a commit: bytes, writes, flushes, latency, and the longest step on the loop.

    python -m scripts.bench_commit [--quick] [--size GIB] [--changes N] [--compactions N]
                                   [--only memory|file|flush]

First the metadata alone: that of a 1 TiB clone with 4 KiB regions, under the real committer
on a real loop. Between two commits 1,000 random new regions become hydrated, until the
metadata has been compacted several times; then it is opened again. A *gap* is the time between
two turns of the loop, in which nothing else was served: a ticker measures it, as wall clock and
as CPU time of the loop's own thread (what another process took from us is only in the first).
A *step* is the time that one of metadata's generators took to the next yield, garbage
collection included. What any of these says of the wall clock, the machine's other work has a
part in: repeat, and take the least.

Then FLUSH through a whole server over unix sockets: one client, and 64 that send theirs at
once, with nothing changed and with new regions before each FLUSH. Commits are counted by the
superblock's generation on disk.
"""

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from nbdtarget.common.clock import LoopClock
from nbdtarget.daemon import process
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets import metadata_io
from nbdtarget.targets.committer import Committer
from nbdtarget_metadata.clone.metadata import CloneMetadata, CloneTransaction
from nbdtarget_metadata.clone.superblock import CLONE
from nbdtarget_metadata.log.superblock import read_superblock
from nbdtarget_metadata.operations import Flush, Operation, Read, Steps, Write
from scripts.fast_path import warn_if_pure
from tests.support.plain_client import CMD_FLUSH, PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

__all__ = ["main"]

GIB: Final = 1 << 30
REGION: Final = 4096
CLIENTS: Final = 64
CHANGES_AT_ONCE: Final = 250  # what a burst of client writes sets in one turn

T = TypeVar("T")


class Tally:
    """The operations that metadata's generators asked for."""

    def __init__(self) -> None:
        self.bytes = self.writes = self.flushes = 0

    def note(self, asked: Operation | tuple[Operation, ...]) -> None:
        each: tuple[Operation, ...]
        each = (asked,) if isinstance(asked, Write | Flush | Read) else asked
        for operation in each:
            if isinstance(operation, Write):
                self.writes += 1
                self.bytes += len(operation.data)
            elif isinstance(operation, Flush):
                self.flushes += 1


class Durations:
    """A histogram of durations, in steps of a microsecond: bounded, whatever is measured."""

    def __init__(self) -> None:
        self.max_ns = 0
        self._counts: Counter[int] = Counter()

    def note(self, ns: int) -> None:
        if ns > self.max_ns:
            self.max_ns = ns
        self._counts[ns // 1000] += 1

    def percentile_ns(self, share: float) -> int:
        left = int(share * self._counts.total())
        for us in sorted(self._counts):
            left -= self._counts[us]
            if left < 0:
                return us * 1000
        return self.max_ns


class Stopwatch:
    """Durations on the wall clock, and in CPU time of the loop's thread."""

    def __init__(self) -> None:
        self.wall = Durations()
        self.cpu = Durations()

    def steps(self, steps: Steps[T], tally: Tally) -> Steps[T]:
        """The same generator, timed from each `send` to the next yield."""
        answer: Any = None
        try:
            while True:
                wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
                try:
                    operation = steps.send(answer)
                except StopIteration as stop:
                    result: T = stop.value
                    return result
                finally:
                    self.wall.note(time.perf_counter_ns() - wall)
                    self.cpu.note(time.thread_time_ns() - cpu)
                tally.note(operation)
                answer = yield operation
        finally:
            steps.close()

    async def tick(self) -> None:
        """Note the time between two turns of the loop, for ever."""
        wall, cpu = time.perf_counter_ns(), time.thread_time_ns()
        while True:
            await asyncio.sleep(0)
            wall_now, cpu_now = time.perf_counter_ns(), time.thread_time_ns()
            self.wall.note(wall_now - wall)
            self.cpu.note(cpu_now - cpu)
            wall, cpu = wall_now, cpu_now

    def show(self, what: str) -> None:
        sides = [
            f"{name} max {side.max_ns / 1e6:6.2f} ms,"
            f" p99.9 {side.percentile_ns(0.999) / 1e6:5.2f} ms"
            for name, side in (("wall:", self.wall), ("CPU:", self.cpu))
        ]
        print(f"  {what:26} {'; '.join(sides)}")


class TimedTransaction:
    """A transaction whose generators are timed, and its own tally."""

    def __init__(
        self, transaction: CloneTransaction, metadata: "TimedMetadata"
    ) -> None:
        self._transaction = transaction
        self._metadata = metadata
        self.tally = Tally()
        self.done = transaction.done

    def journal(self) -> Steps[None]:
        return self._metadata.watch.steps(self._transaction.journal(), self.tally)

    def superblock(self) -> Steps[None]:
        return self._metadata.watch.steps(self._transaction.superblock(), self.tally)


class TimedMetadata:
    """The clone's metadata as the committer sees it, timed.

    Attributes:
        commits: a tally for each.
        compactions: the tally of all.
    """

    def __init__(self, metadata: CloneMetadata, watch: Stopwatch) -> None:
        self.metadata = metadata
        self.watch = watch
        self.commits: list[Tally] = []
        self.compactions = Tally()
        self.abort = metadata.abort
        self.fail = metadata.fail

    @property
    def changed(self) -> bool:
        return self.metadata.changed

    @property
    def needs_compaction(self) -> bool:
        return self.metadata.needs_compaction

    def pre_commit(self, *, clean_shutdown: bool = False) -> TimedTransaction | None:
        transaction = self.metadata.pre_commit(clean_shutdown=clean_shutdown)
        if transaction is None:
            return None
        timed = TimedTransaction(transaction, self)
        self.commits.append(timed.tally)
        return timed

    def compact(self) -> Steps[None]:
        return self.watch.steps(self.metadata.compact(), self.compactions)


def percentile(values: Sequence[int], share: float) -> float:
    return sorted(values)[min(len(values) - 1, int(share * len(values)))]


async def watched(work: Coroutine[Any, Any, T], what: str, steps: Stopwatch) -> T:
    """Await `work` beside a ticker, and say how long it kept the loop to itself."""
    gaps = Stopwatch()
    ticker = asyncio.create_task(gaps.tick())
    await asyncio.sleep(0)
    begin_s = time.perf_counter()
    result = await work
    print(f"{what}: {time.perf_counter() - begin_s:.2f} s")
    ticker.cancel()
    gaps.show("gap between loop turns")
    steps.show("step of a generator")
    return result


async def commit_often(
    timed: TimedMetadata, device: Device, options: argparse.Namespace
) -> list[int]:
    """Commit `options.changes` random new regions at a time until compacted often enough.

    Returns the latencies in ns.
    """
    rng = random.Random(1)
    metadata = timed.metadata
    committer = Committer(
        "bench",
        timed,
        device,
        (MemoryDevice(options.size * GIB),),
        LoopClock(),
        committed=lambda: None,
        failed=lambda: None,
    )
    latencies = []
    moves, arena = 0, metadata._superblock.arena
    while moves < options.compactions:
        for nr in range(options.changes):
            region = rng.randrange(metadata.nr_regions)
            metadata.set_hydrated(region, region + 1)
            if nr % CHANGES_AT_ONCE == CHANGES_AT_ONCE - 1:
                await asyncio.sleep(0)
        begin_ns = time.perf_counter_ns()
        if not await committer.commit():
            raise RuntimeError("a commit failed")
        latencies.append(time.perf_counter_ns() - begin_ns)
        moves += metadata._superblock.arena != arena
        arena = metadata._superblock.arena
    await committer.quiesce()
    return latencies


def show_commits(
    timed: TimedMetadata, latencies: Sequence[int], options: argparse.Namespace
) -> None:
    sizes = sorted(tally.bytes / 1024 for tally in timed.commits)
    beside = timed.compactions.bytes / 1024 / len(sizes)
    writes = statistics.median(tally.writes for tally in timed.commits)
    flushes = statistics.median(tally.flushes for tally in timed.commits)
    print(
        f"  {len(sizes)} commits of {options.changes} random new regions,"
        f" {options.compactions} compactions"
    )
    print(
        f"  {'KiB written per commit':26} median {statistics.median(sizes):.1f},"
        f" mean {statistics.fmean(sizes):.1f}, max {sizes[-1]:.1f};"
        f" compactions add {beside:.1f} on the mean"
    )
    print(
        f"  {'writes, flushes':26} median {writes:.0f}, {flushes:.0f}, superblock FUA"
    )
    print(
        f"  {'latency':26} median {statistics.median(latencies) / 1e6:.2f} ms,"
        f" p99 {percentile(latencies, 0.99) / 1e6:.2f} ms, max {max(latencies) / 1e6:.2f} ms"
    )


async def bench_metadata(options: argparse.Namespace, path: Path | None) -> None:
    size = CloneMetadata.device_size_for(options.size * GIB // REGION)
    device: Device
    if path is None:
        device = MemoryDevice(size)
    else:
        device = await resolve.create_device(str(path), size)
    where = "memory" if path is None else "a file"
    print(f"== metadata of {options.size} GiB in 4 KiB regions, in {where}")

    async def run(steps: Steps[T], watch: Stopwatch) -> T:
        return await metadata_io.run(device, watch.steps(steps, Tally()))

    geometry = {"region_size": REGION, "target_size": options.size * GIB}
    watch = Stopwatch()
    steps = CloneMetadata.format(device_size=size, uuid=bytes(16), **geometry)
    metadata = await watched(run(steps, watch), "format", watch)
    watch = Stopwatch()
    timed = TimedMetadata(metadata, watch)
    latencies = await watched(commit_often(timed, device, options), "commits", watch)
    show_commits(timed, latencies, options)
    del metadata, timed
    watch = Stopwatch()
    steps = CloneMetadata.open(device_size=size, **geometry)
    await watched(run(steps, watch), "open", watch)
    await device.close()


def generation(path: Path) -> int:
    found = metadata_io.run_file(path, read_superblock(CLONE, path.stat().st_size))
    return found.superblock.generation


def flush_rounds(
    clients: Sequence[PlainClient],
    before: Callable[[PlainClient], None],
    options: argparse.Namespace,
) -> tuple[int, float]:
    """Send the FLUSH of each client at once, over and over; return FLUSHes and seconds in them."""
    nr, seconds = 0, 0.0
    end_s = time.monotonic() + options.runtime
    while time.monotonic() < end_s:
        for client in clients:
            before(client)
        begin_s = time.perf_counter()
        for client in clients:
            client.send(CMD_FLUSH)
        for client in clients:
            client.receive()
        seconds += time.perf_counter() - begin_s
        nr += len(clients)
    return nr, seconds


def bench_flushes(options: argparse.Namespace, work: Path) -> None:
    for image in ("source.img", "dest.img"):
        with (work / image).open("wb") as file:
            file.truncate(options.size * GIB)
    path, meta = work / "nbd.sock", work / "meta"
    command = [NBDTARGET, "clone", str(work / "source.img"), str(work / "dest.img")]
    command += ["--metadata", str(meta), "--no-hydration", "--region-size", "4K"]
    command += ["--listen", f"unix:{path}"]
    rng = random.Random(2)

    def write(client: PlainClient) -> None:
        client.write(rng.randrange(client.size // REGION) * REGION, b"x" * REGION)

    print("== FLUSH through a server, files on the disk below")
    with ServerProcess(command, sockets=[path], log=work / "log"):
        for nr_clients in (1, CLIENTS):
            clients = [PlainClient(path) for _ in range(nr_clients)]
            for what, before in (
                ("nothing changed", lambda _: None),
                ("a new region before each", write),
            ):
                first = generation(meta)
                nr, seconds = flush_rounds(clients, before, options)
                commits = generation(meta) - first
                print(
                    f"  {nr_clients:2} clients, {what:24} {nr / seconds:8.0f} FLUSHes/s,"
                    f" {commits / nr:.3f} commits a FLUSH,"
                    f" {commits * nr_clients / nr:.2f} a round"
                )
            for client in clients:
                client.disconnect()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="What a commit costs.")
    parser.add_argument("--size", type=int, default=1024, help="GiB (1024)")
    parser.add_argument("--changes", type=int, default=1000, help="regions (1000)")
    parser.add_argument("--compactions", type=int, default=2, help="to see (2)")
    parser.add_argument("--runtime", type=float, default=1.0, help="s for FLUSHes (1)")
    parser.add_argument("--dir", help="where the files go (a temporary directory)")
    parser.add_argument("--only", choices=("memory", "file", "flush"), action="append")
    parser.add_argument(
        "--quick", action="store_true", help="memory alone, one compaction"
    )
    options = parser.parse_args(argv)
    warn_if_pure()
    parts = options.only or ["memory", "file", "flush"]
    if options.quick:
        options.compactions, options.runtime = 1, 0.5
        parts = options.only or ["memory", "flush"]
    with tempfile.TemporaryDirectory(
        prefix="nbdtarget-bench-", dir=options.dir
    ) as name:
        work = Path(name)
        if "memory" in parts:
            process.run(lambda: bench_metadata(options, None))
        if "file" in parts:
            process.run(lambda: bench_metadata(options, work / "metadata"))
        if "flush" in parts:
            bench_flushes(options, work)
    return 0


if __name__ == "__main__":
    sys.exit(main())
