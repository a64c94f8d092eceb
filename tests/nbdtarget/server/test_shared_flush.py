# SPDX-License-Identifier: Apache-2.0
"""WRITEs with FUA and FLUSHes on the compiled path: those of a batch share one FLUSH of the device."""

import asyncio
import errno as errnos
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.devices import resolve
from nbdtarget.devices.file import device as file_device
from nbdtarget.devices.file import sync
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.file.sync_pace import SyncPace
from nbdtarget.devices.health import HealthState
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.fast import compiled
from nbdtarget.fast.compiled import Syncer
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.poller import POLL_STREAK
from nbdtarget.server.traffic import NR_TOTALS
from nbdtarget.targets.committer import Committer
from nbdtarget_protocol import consts as c
from tests.support.patience import PATIENCE_S
from tests.support.peer import Peer

needs_compiled = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=compiled.describe()
)

SIZE: Final = 4 << 20
SECTORS: Final = SIZE // 512
BLOCK: Final = 64 << 10


class Site:
    """A registry, a listener and the files of one test."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.registry = Registry(resolve)
        limits = Limits(poison_borrowed=True)
        self.listener = Listener(self.registry, limits=limits)
        self.peers: list[Peer] = []

    async def attach(self, *, structured: bool = True) -> Peer:
        peer = await Peer.connect(self.folder / "s")
        self.peers.append(peer)
        await peer.attach(structured=structured)
        return peer

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.listener.start(f"unix:{tmp_path}/s")
    yield made
    for peer in made.peers:
        peer.close()
    await made.listener.close()
    await made.registry.close()


def linear(site: Site, content: bytes) -> str:
    return f"0 {SECTORS} linear {site.file('disk', content)} 0"


def clone(site: Site, content: bytes) -> str:
    source = site.file("source", content)
    site.file("dest", bytes(SIZE))
    names = f"{site.folder}/clone.meta {site.folder}/dest {source}"
    return f"0 {SECTORS} clone {names} {BLOCK // 512}"


async def _hydrated(device: MappedDevice) -> None:
    while not (await device.status())[0][3].split()[3].startswith("64/"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def durable_batch(site: Site, table: str) -> tuple[MappedDevice, Peer, bytes]:
    """A device, a client, and a batch of FUA writes and FLUSHes that was not sent yet."""
    device = await site.registry.create("d", table)
    peer = await site.attach()
    wire = b""
    for nr in range(8):
        payload = bytes([nr + 1]) * 4096
        wire += peer.request(
            c.CMD_WRITE, nr * BLOCK, payload=payload, flags=c.CMD_FLAG_FUA
        )
        wire += peer.request(c.CMD_FLUSH)
    return device, peer, wire


def note_flushes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Note the FLUSHes that files get, by the name of the file."""
    noted: list[str] = []
    submit = FileDevice.submit

    def spy(self: FileDevice, bio: Bio) -> None:
        if bio.op == OP_FLUSH:
            noted.append(Path(self.name).name)
        submit(self, bio)

    monkeypatch.setattr(FileDevice, "submit", spy)
    return noted


@needs_compiled
async def test_durable_requests_of_a_batch_share_their_flushes(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, peer, wire = await durable_batch(site, linear(site, bytes(SIZE)))
    noted = note_flushes(monkeypatch)
    peer.writer.write(wire)
    replies = [await peer.reply() for _ in range(16)]
    assert [reply.error for reply in replies] == [0] * 16
    assert len({reply.cookie for reply in replies}) == 16
    # One for the writes and one for the FLUSHes of each part in which the batch has arrived.
    assert 2 <= len(noted) < 16
    for nr in range(8):
        assert bytes(await device.read(nr * BLOCK, 4096)) == bytes([nr + 1]) * 4096


@needs_compiled
@pytest.mark.parametrize("structured", [True, False])
async def test_failed_sync_fails_all_durable_requests(
    site: Site, monkeypatch: pytest.MonkeyPatch, structured: bool
) -> None:
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach(structured=structured)
    (below,) = device.devices_below()
    assert isinstance(below, FileDevice)

    def fail() -> int:
        raise OSError(errnos.EIO, "lost")

    monkeypatch.setattr(below._syncs, "_has_no_thread", True)
    monkeypatch.setattr(below._syncs, "_fdatasync", fail)
    wire = b""
    for nr in range(4):
        wire += peer.request(
            c.CMD_WRITE, nr * 4096, payload=bytes(4096), flags=c.CMD_FLAG_FUA
        )
        wire += peer.request(c.CMD_FLUSH)
    peer.writer.write(wire)
    assert [(await peer.reply()).error for _ in range(8)] == [errnos.EIO] * 8
    assert (await peer.ask(c.CMD_WRITE, 0, payload=bytes(512))).error == 0


@needs_compiled
async def test_flush_tells_of_a_loss_and_fua_does_not(site: Site) -> None:
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    (below,) = device.devices_below()
    below.health.note_loss()
    fua = c.CMD_FLAG_FUA
    assert (await peer.ask(c.CMD_WRITE, 0, payload=b"x", flags=fua)).error == 0
    assert (await peer.ask(c.CMD_FLUSH)).error == errnos.EIO
    assert (await peer.ask(c.CMD_FLUSH)).error == 0


# ---- a client that is alone ----


class AlwaysQuick(SyncPace):
    """On a busy machine no sync may be quick."""

    @property
    def is_quick(self) -> bool:
        return True


def be_patient(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Have files lend their threads, and the loop wait for them however long it takes. Returns the FLUSHes that files get from Python: their flags."""
    noted: list[int] = []
    submit = FileDevice.submit

    def spy(self: FileDevice, bio: Bio) -> None:
        if bio.op == OP_FLUSH:
            noted.append(bio.flags)
        submit(self, bio)

    monkeypatch.setattr(FileDevice, "submit", spy)
    monkeypatch.setattr(sync, "SyncPace", AlwaysQuick)
    monkeypatch.setattr(sync, "QUICK_NS", int(PATIENCE_S * 10**9))
    # A busy machine must not make a write count as slow: the next ones would take another way.
    monkeypatch.setattr(file_device, "WRITE_SLOW_NS", 1 << 62)
    return noted


async def ask_often(peer: Peer, nr: int, command: int) -> list[int]:
    """Send one durable request after the other; returns their errors."""
    errors = []
    for at in range(nr):
        if command == c.CMD_WRITE:
            data, flags = bytes([at + 1]) * 512, c.CMD_FLAG_FUA
            reply = await peer.ask(command, at * 512, payload=data, flags=flags)
        else:
            reply = await peer.ask(command)
        errors.append(reply.error)
    return errors


def file_below(device: MappedDevice, name: str) -> FileDevice:
    for below in device.devices_below():
        if isinstance(below, FileDevice) and Path(below.name).name == name:
            return below
    raise AssertionError(name)


def nr_synced(device: FileDevice) -> int:
    """How many times the compiled path has synced it."""
    fast = device.maybe_fast_file()
    assert fast is not None
    return fast.nr_synced


@needs_compiled
@pytest.mark.parametrize("command", [c.CMD_WRITE, c.CMD_FLUSH])
@pytest.mark.parametrize("table", [linear, clone])
async def test_a_client_that_asks_for_one_thing_at_a_time_is_synced_for_without_python(
    site: Site,
    monkeypatch: pytest.MonkeyPatch,
    table: Callable[[Site, bytes], str],
    command: int,
) -> None:
    noted = be_patient(monkeypatch)
    device = await site.registry.create("d", table(site, bytes(SIZE)))
    if table is clone:
        await _hydrated(device)
        await device.flush()
    peer = await site.attach()
    noted.clear()
    nr = POLL_STREAK + 10
    assert await ask_often(peer, nr, command) == [0] * nr
    assert noted == [0] * POLL_STREAK
    below = file_below(device, "dest" if table is clone else "disk")
    assert nr_synced(below) == 10
    if command == c.CMD_WRITE:
        for at in range(nr):
            assert bytes(await device.read(at * 512, 512)) == bytes([at + 1]) * 512
    account = site.listener.accounts.of(device)
    assert account is not None
    assert account.counts()[command][0] == nr
    assert sum(account.counts()[command][NR_TOTALS:]) == nr


@needs_compiled
async def test_a_client_in_another_thread_stays_with_the_one_that_syncs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop has nothing else to do: one turn serves several requests, each with a sync."""
    be_patient(monkeypatch)
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    route = device.maybe_route()
    assert route is not None
    turns: list[int] = []

    def may_sync() -> bool:
        turns.append(0)
        return True

    route.may_sync = may_sync
    fast = file_below(device, "disk").maybe_fast_file()
    assert fast is not None

    async def ask_until_several_are_served_at_a_time() -> None:
        peer = await Peer.connect(site.folder / "s")
        await peer.attach(structured=True)
        synced, turned = 0, 0
        # On a busy machine most turns end early, because this client is late: only the last requests count.
        while synced <= turned:
            synced_before, turns_before = fast.nr_synced, len(turns)
            assert not any(await ask_often(peer, 50, c.CMD_WRITE))
            synced = fast.nr_synced - synced_before
            turned = len(turns) - turns_before
        assert (await peer.ask(c.CMD_READ, 512, 512)).data == bytes([2]) * 512
        peer.writer.close()
        await peer.writer.wait_closed()

    def client() -> None:
        asyncio.run(
            asyncio.wait_for(ask_until_several_are_served_at_a_time(), PATIENCE_S)
        )

    await asyncio.to_thread(client)
    assert turns


@needs_compiled
async def test_a_clone_that_has_something_to_commit_needs_python(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = be_patient(monkeypatch)
    device = await site.registry.create("d", clone(site, bytes(SIZE)))
    await _hydrated(device)
    await device.flush()
    peer = await site.attach()
    assert not any(await ask_often(peer, POLL_STREAK + 3, c.CMD_FLUSH))
    noted.clear()
    changed = {"is": True}
    monkeypatch.setattr(Committer, "is_clean", property(lambda _: not changed["is"]))
    assert not any(await ask_often(peer, 1, c.CMD_FLUSH))
    assert noted
    changed["is"] = False
    noted.clear()
    assert not any(await ask_often(peer, 1, c.CMD_FLUSH))
    assert not noted


@needs_compiled
async def test_batches_and_other_clients_are_not_alone(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer, other = await site.attach(), await site.attach()
    assert not any(await ask_often(peer, POLL_STREAK, c.CMD_FLUSH))
    assert (await other.ask(c.CMD_FLUSH)).error == 0
    assert not any(await ask_often(peer, 3, c.CMD_FLUSH))
    peer.writer.write(peer.request(c.CMD_FLUSH) * 2)
    assert [(await peer.reply()).error for _ in range(2)] == [0, 0]
    assert nr_synced(file_below(device, "disk")) == 0


@needs_compiled
async def test_a_sync_that_fails_is_told_and_nothing_is_acknowledged_after_it(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    below = file_below(device, "disk")
    reading, writing = os.pipe()
    monkeypatch.setattr(below._syncs, "_has_begun", lambda: False)
    assert not any(await ask_often(peer, POLL_STREAK, c.CMD_FLUSH))
    below._syncs._syncer = Syncer(reading)  # what cannot be synced
    below._syncs._syncer.begin()
    while below._syncs._syncer.take() < 0:  # noqa: ASYNC110
        await asyncio.sleep(0.001)
    assert not any(await ask_often(peer, 1, c.CMD_FLUSH))
    fast = below.maybe_fast_file()
    assert fast is not None
    assert fast.syncer is below._syncs._syncer
    assert await ask_often(peer, 2, c.CMD_WRITE) == [errnos.EIO] * 2
    assert below.health.state is HealthState.LATCHED
    assert nr_synced(below) == 0
    assert await ask_often(peer, 2, c.CMD_FLUSH) == [errnos.EIO] * 2
    os.close(writing)
    os.close(reading)


@needs_compiled
async def test_a_client_that_is_alone_is_told_of_a_loss(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    be_patient(monkeypatch)
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    assert not any(await ask_often(peer, POLL_STREAK + 3, c.CMD_FLUSH))
    below = file_below(device, "disk")
    below.health.note_loss()
    before = nr_synced(below)
    assert await ask_often(peer, 1, c.CMD_WRITE) == [0]
    assert nr_synced(below) == before + 1
    assert await ask_often(peer, 2, c.CMD_FLUSH) == [errnos.EIO, 0]
    assert nr_synced(below) == before + 2


@needs_compiled
async def test_client_that_leaves_before_its_flush_ends_is_released(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    (below,) = device.devices_below()
    assert isinstance(below, FileDevice)
    held: list[Bio] = []
    monkeypatch.setattr(below._syncs, "flush", held.append)
    peer.writer.write(peer.request(c.CMD_FLUSH) + peer.request(c.CMD_FLUSH))
    async with asyncio.timeout(PATIENCE_S):
        while not held:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
    peer.close()
    await asyncio.sleep(0.01)
    for bio in held:
        bio.end(0)
    monkeypatch.undo()
    other = await site.attach()
    assert (await other.ask(c.CMD_FLUSH)).error == 0


@needs_compiled
async def test_fua_to_a_clone_is_committed_before_it_is_answered(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    device, peer, wire = await durable_batch(site, clone(site, os.urandom(SIZE)))
    await _hydrated(device)
    await device.flush()
    noted = note_flushes(monkeypatch)
    peer.writer.write(wire)
    assert [(await peer.reply()).error for _ in range(16)] == [0] * 16
    assert noted
    assert set(noted) == {"dest"}  # nothing has changed that needs a commit
