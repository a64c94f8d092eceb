# SPDX-License-Identifier: Apache-2.0
"""How long `/metrics` takes of a server with many devices that clients have used, and how long the event loop stands still for it; and
what counting costs on the compiled path (`bench_counting.c`).

    python -m scripts.bench_metrics [DEVICES]

The devices are in this process. Each has numbers for all operations.
"""

import asyncio
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Final

from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.listener import Listener
from nbdtarget.server.traffic import OPERATIONS

NR_DEVICES: Final = 1000
ROUNDS: Final = 11
MS_NS: Final = 1e6
# Reads of 4 KiB of `linear` in the README: at depth 1, and at depth 32.
PER_S_SINGLE: Final = 42_751
PER_S_BATCHES: Final = 199_121


async def _longest_turn_ns(until: asyncio.Task[bytes]) -> int:
    longest, before = 0, perf_counter_ns()
    while not until.done():
        await asyncio.sleep(0)
        now = perf_counter_ns()
        longest, before = max(longest, now - before), now
    return longest


async def measure(nr_devices: int) -> str:
    """Returns what is printed."""
    registry = Registry(resolve)
    listener = Listener(registry)
    used = []
    for nr in range(nr_devices):
        name = f"disk-{nr:04}"
        device = await registry.create(name, "0 2048 linear memory:1M 0")
        traffic = listener.accounts.open(device)
        for command in OPERATIONS:
            traffic.note(command, 1000 + nr, 4096 * nr, 30_000)
        used.append(traffic)
    observer = Observer(registry, listener)
    await observer.metrics()  # imports what it needs
    alone, busy, turns, size = [], [], [], 0
    for _ in range(ROUNDS):
        for traffic in used:  # something was asked for since the last time
            for command in OPERATIONS:
                traffic.note(command, 1, 4096, 31_234)
        begun, begun_cpu = perf_counter_ns(), time.process_time_ns()
        text = await observer.metrics()
        alone.append(perf_counter_ns() - begun)
        busy.append(time.process_time_ns() - begun_cpu)
        size = len(text.splitlines())
        task = asyncio.create_task(observer.metrics())
        turns.append(await _longest_turn_ns(task))
    observer.loop_lag.stop()
    await registry.close()
    return (
        f"{nr_devices} devices, {size} lines: {median(alone) / MS_NS:.1f} ms"
        f" ({min(alone) / MS_NS:.1f} to {max(alone) / MS_NS:.1f}),"
        f" {median(busy) / MS_NS:.1f} ms of the processor's time;"
        f" longest turn of the loop {median(turns) / MS_NS:.1f} ms"
    )


def counting() -> str:
    """Returns what is printed. The times are of the processor, so other programs disturb less."""
    source = Path(__file__).with_name("bench_counting.c")
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder) / "counting"
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
        done = subprocess.run(
            [program, str(PER_S_SINGLE), str(PER_S_BATCHES)],
            capture_output=True,
            text=True,
            check=True,
        )
    lines = [
        "counting while the server is busy, ns a batch (of the time of its requests, as in the README):"
    ]
    for line in done.stdout.splitlines():
        kind, nr, counter, clock, _, timed = line.split()
        per_s = PER_S_BATCHES if kind == "batch" else PER_S_SINGLE
        batch_ns = int(nr) / per_s * 1e9
        told = " ".join(
            f"{float(ns):6.1f} ({float(ns) / batch_ns:.2%})" for ns in (counter, clock)
        )
        lines.append(f"  {kind:6} {nr:>2}: {told} with the clock; {timed} % were timed")
    return "\n".join(lines)


def main() -> int:
    """Measure and print."""
    import uvloop

    nr_devices = int(sys.argv[1]) if len(sys.argv) > 1 else NR_DEVICES
    print(uvloop.run(measure(nr_devices)))
    if shutil.which("cc") is None:
        print("counting: not measured, for there is no C compiler")
    else:
        print(counting())
    return 0


if __name__ == "__main__":
    sys.exit(main())
