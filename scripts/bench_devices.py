#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Measures the cost of a device: the figures of the `# hot:` comments in nbdtarget/devices/.

    scripts/bench_devices.py [NAME...]     PATH, memory:SIZE: nanoseconds an inline 4 KiB bio
    scripts/bench_devices.py nbd+unix://…  GB/s of reads in flight together

Without a NAME: a new file in the current directory, one in /dev/shm, and memory. Files that
are named are written to.
"""

import asyncio
import os
import sys
import time

import uvloop

from nbdtarget.bio import OP_NAMES, OP_READ, OP_WRITE, Bio
from nbdtarget.devices.base import Device
from nbdtarget.devices.resolve import create_device, open_device

SIZE = 16 << 20
BIOS = 20_000
ROUNDS = 7


def ended(_: Bio) -> None: ...


def ns_per_bio(device: Device, op: int) -> float:
    """The best of ROUNDS, less what making the bio costs."""
    buffer = memoryview(bytearray(4096))
    best = empty = float("inf")
    for _ in range(ROUNDS):
        start = time.perf_counter_ns()
        for nr in range(BIOS):
            Bio(op, (nr << 12) % SIZE, 4096, buffer, 0, ended)
        middle = time.perf_counter_ns()
        for nr in range(BIOS):
            device.submit(Bio(op, (nr << 12) % SIZE, 4096, buffer, 0, ended))
        best = min(best, time.perf_counter_ns() - middle)
        empty = min(empty, middle - start)
    return (best - empty) / BIOS


async def bench_inline(device: Device) -> None:
    for offset in range(0, SIZE, 4096):
        await device.write(offset, bytes(4096))
    await device.flush()
    for op in (OP_READ, OP_WRITE):
        figure = ns_per_bio(device, op)
        print(f"{device.name}: {OP_NAMES[op]} 4 KiB: {figure:.0f} ns")


async def bench_stream(device: Device, *, length: int, depth: int) -> None:
    at = 0

    async def reader() -> None:
        nonlocal at
        buffer = memoryview(bytearray(length))
        while at + length <= device.size:
            offset, at = at, at + length
            await device.readinto(offset, buffer)

    start = time.perf_counter()
    await asyncio.gather(*(reader() for _ in range(depth)))
    rate = at / (time.perf_counter() - start) / 1e9
    print(f"{device.name}: read {length >> 10} KiB, {depth} in flight: {rate:.2f} GB/s")


async def bench(name: str) -> None:
    if name.startswith("nbd"):
        device = await open_device(name, read_only=True)
        for _ in range(3):
            for length, depth in ((64 << 10, 16), (256 << 10, 8), (1 << 20, 4)):
                await bench_stream(device, length=length, depth=depth)
    else:
        device = await open_device(name)
        await bench_inline(device)
    await device.close()


async def main(names: list[str]) -> None:
    for name in names:
        await bench(name)
    if not names:
        made = [f"{directory}/bench.{os.getpid()}" for directory in (".", "/dev/shm")]
        for name in made:
            device = await create_device(name, SIZE, sparse=True)
            await device.close()
            await bench(name)
            os.unlink(name)
        await bench(f"memory:{SIZE}")


if __name__ == "__main__":
    uvloop.run(main(sys.argv[1:]))
