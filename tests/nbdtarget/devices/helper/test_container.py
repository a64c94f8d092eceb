# SPDX-License-Identifier: Apache-2.0
"""Container: a disk of ours, as its helper reads it."""

import asyncio
import errno as errnos
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.helper import container as module
from nbdtarget.devices.helper.container import Container
from nbdtarget.devices.nbd.device import NbdDevice, open_nbd
from nbdtarget_protocol import consts

SIZE = 100_001
CONTENT = bytes(range(251)) * 400


class Below(Device):
    """Reads `CONTENT`, but for what begins at `bad`; while the gate is shut, nothing ends."""

    bad = -1

    def __init__(self) -> None:
        super().__init__("below", -(-SIZE // 512) * 512, read_only=True)
        self.gate = asyncio.Event()
        self.gate.set()
        self.begun: asyncio.Queue[int] = asyncio.Queue()
        self.tasks = Tasks()
        self.is_closed = False

    @property
    def exact_size(self) -> int:
        return SIZE

    def submit(self, bio: Bio) -> None:
        self.begun.put_nowait(bio.offset)
        bio.own()
        self.tasks.start(self._end(bio))

    async def _end(self, bio: Bio) -> None:
        await self.gate.wait()
        assert bio.op == OP_READ
        if bio.offset == self.bad:
            bio.end(errnos.EIO)
            return
        assert bio.payload is not None
        bio.payload[:] = CONTENT[bio.offset : bio.offset + bio.length]
        bio.end(0)

    async def close(self) -> None:
        self.is_closed = True


@asynccontextmanager
async def served(below: Below) -> AsyncIterator[tuple[Container, NbdDevice]]:
    container = Container(below)
    await container.start()
    uri = f"nbd+unix:///?socket={container.path}&connections=1"
    device = await open_nbd(uri, read_only=True)
    try:
        yield container, device
    finally:
        await device.close()
        await container.close()
        assert below.is_closed


async def test_helper_reads_the_exact_size_and_nothing_is_written() -> None:
    async with served(Below()) as (_, device):
        assert device.size == SIZE
        assert await device.read(0, SIZE) == CONTENT[:SIZE]
        assert await device.read(99_999, 2) == CONTENT[99_999:100_001]


async def test_error_of_one_read_ends_that_one_only() -> None:
    below = Below()
    below.bad = 512
    async with served(below) as (_, device):
        with pytest.raises(DeviceError):
            await device.read(512, 512)
        assert await device.read(1024, 512) == CONTENT[1024:1536]


async def test_reads_are_under_way_together_up_to_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "READS_MAX", 3)
    below = Below()
    async with served(below) as (_, device):
        below.gate.clear()
        reads = [asyncio.ensure_future(device.read(nr, 1)) for nr in range(9)]
        assert [await below.begun.get() for _ in range(3)] == [0, 1, 2]
        for _ in range(20):
            await asyncio.sleep(0.001)
        assert below.begun.empty()
        below.gate.set()
        for nr, read in enumerate(reads):
            assert await read == CONTENT[nr : nr + 1]


async def test_close_does_not_wait_for_what_hangs() -> None:
    below = Below()
    container = Container(below)
    await container.start()
    device = await open_nbd(
        f"nbd+unix:///?socket={container.path}&connections=1", read_only=True
    )
    below.gate.clear()
    reading = asyncio.ensure_future(device.read(0, 1))
    await below.begun.get()
    await container.close()
    with pytest.raises(DeviceError):
        await reading
    await device.close()
    below.gate.set()
    await below.tasks.wait()


@pytest.mark.parametrize(
    "sent",
    [
        b"\0" * 28,
        consts.REQUEST.pack(consts.REQUEST_MAGIC, 0, consts.CMD_WRITE, 1, 0, 512),
    ],
    ids=["no-request", "write"],
)
async def test_what_no_helper_sends_ends_its_connection(sent: bytes) -> None:
    container = Container(Below())
    await container.start()
    sock = socket.socket(socket.AF_UNIX)
    sock.setblocking(False)
    loop = asyncio.get_running_loop()
    await loop.sock_connect(sock, container.path)
    go = consts.U32.pack(0) + b"\0\0"
    await loop.sock_sendall(
        sock,
        consts.U32.pack(3)
        + consts.OPTION.pack(consts.IHAVEOPT, consts.OPT_GO, len(go))
        + go,
    )
    received = b""
    while not received.endswith(
        consts.OPTION_REPLY.pack(
            consts.OPTION_REPLY_MAGIC, consts.OPT_GO, consts.REP_ACK, 0
        )
    ):
        received += await loop.sock_recv(sock, 4096)
    await loop.sock_sendall(sock, sent)
    assert await loop.sock_recv(sock, 4096) == b""
    sock.close()
    await container.close()
