# SPDX-License-Identifier: Apache-2.0
"""The server that a table writes to is killed and started again, while a client writes and flushes."""

import asyncio
import contextlib
import random
import shutil
import socket
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.devices.nbd import device as nbd_module
from nbdtarget.dm.registry import Registry
from nbdtarget.server.listener import Listener
from nbdtarget_protocol import consts as c
from tests.support.patience import attempts
from tests.support.peer import Peer

pytestmark = pytest.mark.interop

MIB = 1 << 20
BLOCK = 4096
SERVERS = {
    "nbdkit": ["nbdkit", "-f", "-U", "{socket}", "file", "{disk}"],
    # Unflushed writes lie in the memory of the server, and are lost when it dies.
    "nbdkit that forgets": [
        *["nbdkit", "-f", "-U", "{socket}", "--filter=cache", "file", "{disk}"],
        "cache=writeback",
    ],
    "qemu-nbd": [
        *["qemu-nbd", "-f", "raw", "-k", "{socket}", "--persistent", "--shared=8"],
        "{disk}",
    ],
}
TABLES = {
    "linear": "0 2048 linear {back} 0",
    "clone": "0 2048 clone {work}/m {back} {work}/other 8 1 no_hydration",
    "cache": "0 2048 cache {work}/m {work}/other {back} 64 1 writethrough default 0",
}


class Backend:
    def __init__(self, command: list[str], work: Path) -> None:
        if shutil.which(command[0]) is None:
            pytest.skip(f"{command[0]} is not installed")
        self.path = work / "back.sock"
        words = {"socket": self.path, "disk": work / "back"}
        self.argv = [word.format(**words) for word in command]
        self.uri = f"nbd+unix:///?socket={self.path}"

    async def start(self) -> None:
        self.path.unlink(missing_ok=True)
        self.process = await asyncio.create_subprocess_exec(*self.argv)
        async for _ in attempts():
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self.path))
                return

    async def kill(self) -> None:
        self.process.kill()
        await self.process.wait()


class Client:
    """Writes stamps, and knows which of them a later reader may find."""

    def __init__(self, peer: Peer, seed: int) -> None:
        self.peer = peer
        self.rng = random.Random(seed)
        self.stamp = 0
        self.may_be: dict[int, set[int]] = {nr: {0} for nr in range(MIB // BLOCK)}
        self.unflushed: dict[
            int, int
        ] = {}  # block: the stamp that was acknowledged last
        self.nr_flushes = 0

    async def write(self) -> bool:
        """Write a stamp. Returns whether all of it was acknowledged."""
        is_good = True
        for _ in range(8):
            nr = self.rng.randrange(MIB // BLOCK)
            self.stamp += 1
            self.may_be[nr].add(self.stamp)
            data = self.stamp.to_bytes(8, "big") * (BLOCK // 8)
            reply = await self.peer.ask(c.CMD_WRITE, nr * BLOCK, payload=data)
            is_good &= not reply.error
            if not reply.error:
                self.unflushed[nr] = self.stamp
            else:
                self.unflushed.pop(nr, None)
        return is_good

    async def flush(self) -> bool:
        if (await self.peer.ask(c.CMD_FLUSH)).error:
            self.unflushed.clear()  # the client knows the fate of each write
            return False
        self.nr_flushes += 1
        for nr, stamp in self.unflushed.items():
            self.may_be[nr] = {stamp}
        self.unflushed.clear()
        return True

    async def write_and_flush(self) -> bool:
        is_good = await self.write()
        return await self.flush() and is_good

    async def until_readable(self) -> None:
        async for _ in attempts():
            if not (await self.peer.ask(c.CMD_READ, 0, MIB)).error:
                return

    async def verify(self) -> None:
        for nr, allowed in self.may_be.items():
            reply = await self.peer.ask(c.CMD_READ, nr * BLOCK, BLOCK)
            assert reply.error == 0
            stamp = int.from_bytes(reply.data[:8], "big")
            assert reply.data == stamp.to_bytes(8, "big") * (BLOCK // 8)
            assert stamp in allowed, f"block {nr} has {stamp}, not one of {allowed}"


async def cure(registry: Registry, table: str) -> None:
    """Load and resume the same line until it works, as an operator does."""
    async for _ in attempts():
        with contextlib.suppress(NbdTargetError):
            await registry.load("d", table)
            await registry.resume("d")
            return


@pytest.mark.parametrize("kind", sorted(TABLES))
@pytest.mark.parametrize("server", sorted(SERVERS))
async def test_nothing_flushed_is_lost_when_the_server_below_is_killed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    server: str,
    kind: str,
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.01)
    for name in ("back", "other"):
        (tmp_path / name).write_bytes(bytes(MIB))
    backend = Backend(SERVERS[server], tmp_path)
    await backend.start()
    registry = Registry(resolve)
    table = TABLES[kind].format(back=backend.uri, work=tmp_path)
    await registry.create("d", table)
    listener = Listener(registry)
    await listener.start(f"unix:{tmp_path}/s")
    peer = await Peer.connect(tmp_path / "s")
    await peer.attach()
    client = Client(peer, seed=7)
    try:
        for is_idle in (False, True):
            for _ in range(4):
                assert await client.write_and_flush()
            if is_idle:
                # Only the FLUSH of the acknowledged write finds out about the loss.
                assert await client.write()
                await backend.kill()
                await backend.start()
                await client.until_readable()
                await client.flush()
            else:
                await asyncio.gather(client.write_and_flush(), backend.kill())
                assert not await client.write_and_flush()
                await backend.start()
            for attempt in range(100):
                if await client.write_and_flush():
                    break
                if attempt % 10 == 9:
                    await cure(registry, table)
            else:
                raise AssertionError("it never goes on")
            await client.verify()
        assert client.nr_flushes >= 10
        peer.close()
        await listener.close()
        await registry.close()
    finally:
        await backend.kill()
