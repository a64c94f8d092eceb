# SPDX-License-Identifier: Apache-2.0
"""Checklist 2.0: what the core does with a request before a clone sees it.

The kernel's core cuts reads and writes at region borders. Ours does not: the target looks at
the range, and cuts it into runs of equal state. What a client sees must be the same.
"""

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from nbdtarget.bio import (
    FUA,
    NO_UNMAP,
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.clone import REGION
from tests.support.dm import RamDevice, RamOpener, make_registry

SIZE = 16 * REGION
TABLE = f"0 {SIZE // 512} clone /m /d /s 8 1 no_hydration"


class Stack:
    """A mapped device with a clone on it."""

    def __init__(
        self, registry: Registry, opener: RamOpener, device: MappedDevice
    ) -> None:
        self.registry = registry
        self.device = device
        self.metadata, self.destination, self.source = (
            opener.open[name] for name in ("/m", "/d", "/s")
        )

    def log(self, disk: RamDevice) -> list[tuple[str, int, int, int]]:
        """(operation, offset, length, flags) so far; forgets them."""
        log, disk.log = disk.log, []
        return [(OP_NAMES[op], at, n, flags) for op, at, n, flags in log]


@pytest.fixture
async def stack() -> AsyncIterator[Stack]:
    size = CloneMetadata.device_size_for(16)
    registry, opener = make_registry(m=size, d=SIZE, s=SIZE)
    device = await registry.create("c", TABLE)
    stack = Stack(registry, opener, device)
    stack.source.data[:] = random.Random(3).randbytes(SIZE)
    stack.destination.log.clear()  # it was looked at: it must be blank
    yield stack
    await registry.close()


async def test_2_0_request_over_region_borders_reads_as_if_it_were_cut(
    stack: Stack,
) -> None:
    want = bytearray(stack.source.data)
    await stack.device.write(2 * REGION + 100, b"x" * 5 * REGION)
    want[2 * REGION + 100 : 7 * REGION + 100] = b"x" * 5 * REGION
    assert await stack.device.read(0, SIZE) == want
    for begin in range(0, SIZE - 3 * REGION, 1000):
        got = await stack.device.read(begin, 3 * REGION)
        assert got == want[begin : begin + 3 * REGION]


async def test_2_0_requests_are_not_cut_where_their_regions_are_alike(
    stack: Stack,
) -> None:
    await stack.device.read(100, 5 * REGION)
    await stack.device.write(0, b"x" * 8 * REGION)
    assert stack.log(stack.source) == [("read", 100, 5 * REGION, 0)]
    assert stack.log(stack.destination) == [("write", 0, 8 * REGION, 0)]


async def test_2_0_discard_is_not_cut(stack: Stack) -> None:
    await stack.device.write(3 * REGION, b"x" * REGION)
    stack.log(stack.destination)
    await stack.device.discard(REGION, 10 * REGION)
    assert (await stack.device.status())[0][3].split()[3] == "10/16"


async def test_2_0_flush_reaches_the_target_once(stack: Stack) -> None:
    # There is no request with data and PREFLUSH in NBD: a FLUSH comes alone.
    await stack.device.flush()
    assert stack.log(stack.destination) == [("flush", 0, 0, 0)]


async def test_2_0_fua_stays_on_the_data_where_nothing_else_makes_it_durable(
    stack: Stack,
) -> None:
    await stack.device.write(0, b"x" * REGION)
    await stack.device.flush()
    stack.log(stack.destination)
    await stack.device.write(0, b"y" * REGION, fua=True)
    assert stack.log(stack.destination) == [("write", 0, REGION, FUA)]
    # An overwrite's commit flushes the destination: that makes it durable, without FUA.
    await stack.device.write(REGION, b"y" * REGION, fua=True)
    assert stack.log(stack.destination) == [
        ("write", REGION, REGION, 0),
        ("flush", 0, 0, 0),
    ]


@pytest.mark.parametrize("flags", [0, NO_UNMAP])
@pytest.mark.parametrize(
    ("begin", "length"), [(0, 4 * REGION), (512, 512), (REGION - 512, 3 * REGION)]
)
async def test_2_0_write_zeroes_is_zeroes_and_never_a_discard(
    stack: Stack, begin: int, length: int, flags: int
) -> None:
    stack.destination.data[:] = b"old data" * (SIZE // 8)
    want = bytearray(stack.source.data)
    want[begin : begin + length] = bytes(length)
    bio = Bio(OP_WRITE_ZEROES, begin, length, None, flags, lambda _: None)
    stack.device.submit(bio)
    await settle()
    assert bio.status == 0
    asked = {op for op, *_ in stack.log(stack.destination)}
    assert OP_NAMES[OP_DISCARD] not in asked
    assert asked <= {OP_NAMES[OP_WRITE], OP_NAMES[OP_WRITE_ZEROES]}
    assert await stack.device.read(0, SIZE) == want


async def test_2_0_suspend_waits_for_what_is_in_flight_and_keeps_what_comes(
    stack: Stack,
) -> None:
    stack.source.hold = True
    before = Bio(OP_READ, 0, 512, memoryview(bytearray(512)), 0, lambda _: None)
    stack.device.submit(before)
    suspending = asyncio.create_task(stack.registry.suspend("c"))
    await settle()
    after = Bio(OP_FLUSH, 0, 0, None, 0, lambda _: None)
    stack.device.submit(after)
    assert not suspending.done()
    stack.source.let_go()
    await suspending
    assert (before.status, after.status) == (0, -1)
    await stack.registry.resume("c")
    assert after.status == 0
