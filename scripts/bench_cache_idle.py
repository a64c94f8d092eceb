# SPDX-License-Identifier: Apache-2.0
"""Measures the I/O of a clean cache when no client asks for anything: there should be none.

A cache that was warmed, written to and written back is left alone, with a client connected. The kernel's
own books tell what its process did meanwhile:

    system calls that read or write   /proc/PID/io, all threads; sockets are counted apart by the kernel, but
                                      the loop's wake-up pipe is in it
    bytes to and from disks           the same
    writes to the devices             their modification times
    wake-ups and CPU time             /proc/PID/task/*/status and schedstat: the policy's clock ticks
"""

import argparse
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rich.console import Console

from scripts.bench_rounds import make_image
from scripts.cache_under_test import KIB, MIB, CacheUnderTest
from tests.support.plain_client import PlainClient

__all__ = ["run"]

BLOCK_SIZE: Final = 64 * KIB
SIZE: Final = 64 * MIB
SETTLE_S: Final = 3.0  # what had been started may end


@dataclass(frozen=True)
class Books:
    """The kernel's counters of a process, and of the files below it."""

    read_calls: int
    write_calls: int
    disk_read_bytes: int
    disk_write_bytes: int
    wake_ups: int
    cpu_ns: int
    modified_ns: int  # of all devices together


def look(pid: int, devices: list[Path]) -> Books:
    io = dict(
        line.split(": ") for line in Path(f"/proc/{pid}/io").read_text().splitlines()
    )
    wake_ups = cpu_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        status = (task / "status").read_text()
        found = re.search(r"^voluntary_ctxt_switches:\s+(\d+)$", status, re.MULTILINE)
        assert found is not None
        wake_ups += int(found[1])
        cpu_ns += int((task / "schedstat").read_text().split()[0])
    return Books(
        read_calls=int(io["syscr"]),
        write_calls=int(io["syscw"]),
        disk_read_bytes=int(io["read_bytes"]),
        disk_write_bytes=int(io["write_bytes"]),
        wake_ups=wake_ups,
        cpu_ns=cpu_ns,
        modified_ns=sum(path.stat().st_mtime_ns for path in devices),
    )


def run(work: Path, options: argparse.Namespace, console: Console) -> dict[str, Any]:
    """Measure, print; return the results."""
    origin = work / "origin.img"
    make_image(origin, SIZE)
    cache = CacheUnderTest(work, str(origin), SIZE, block_size=BLOCK_SIZE)
    cache.make_device(SIZE // 2)
    devices = [origin, cache.device, cache.metadata]
    with cache.serving() as process, PlainClient(cache.socket, cache.export) as client:
        cache.warm(0, SIZE // 2 // BLOCK_SIZE)
        for offset in range(0, SIZE // 2, BLOCK_SIZE):
            client.write(offset, bytes(4 * KIB))
        cache.clean()
        time.sleep(SETTLE_S)
        before = look(process.pid, devices)
        time.sleep(options.idle)
        after = look(process.pid, devices)
        client.disconnect()
    deltas = {
        name: value - asdict(before)[name] for name, value in asdict(after).items()
    }
    is_still = not any(
        value for name, value in deltas.items() if name not in ("wake_ups", "cpu_ns")
    )
    console.print(
        f"{options.idle:.0f} s idle and clean: {deltas['read_calls']} read and"
        f" {deltas['write_calls']} write calls, {deltas['disk_read_bytes']} bytes read from and"
        f" {deltas['disk_write_bytes']} written to disks, devices"
        f" {'modified' if deltas['modified_ns'] else 'untouched'}; {deltas['wake_ups']} wake-ups,"
        f" {deltas['cpu_ns'] / 1e6:.1f} ms of CPU (wanted: no I/O): {'yes' if is_still else 'NO'}"
    )
    return {"seconds": options.idle, "is_still": is_still, **deltas}
