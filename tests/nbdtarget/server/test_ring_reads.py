# SPDX-License-Identifier: Apache-2.0
"""READs that wait for the disk without a bio: all that waits for requests in flight waits for them, too.

`Held` keeps what has ended in the ring, so that a test decides when the server hears of it.
"""

import asyncio
import errno as errnos
import os
import select
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.devices.file import ring
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.fast import compiled
from nbdtarget.server.limits import Limits
from nbdtarget_protocol import consts as c
from tests.support.patience import until
from tests.support.peer import Peer
from tests.support.site import (
    BLOCK,
    SECTORS,
    SIZE,
    Site,
    cache,
    clone,
    force_misses,
    linear,
)

pytestmark = pytest.mark.skipif(
    not compiled.is_available(), reason="io_uring is not built, or not allowed"
)

CONTENT = os.urandom(SIZE)


class Held:
    """From `hold` to `let_go` the loop does not hear of reads that have ended."""

    def __init__(self) -> None:
        ring.find_out()  # as when a file is opened: this may be the first test of its process
        reader = ring.maybe_reader()
        assert reader is not None
        self.reader = reader

    def hold(self) -> None:
        self.reader.loop.remove_reader(self.reader.ring.event_fd)

    async def until(self, nr: int) -> None:
        await until(lambda: self.reader.ring.nr_reads >= nr)

    async def until_ended(self) -> None:
        """Wait until the kernel tells that reads have ended."""
        event_fd = self.reader.ring.event_fd
        await until(lambda: bool(select.select([event_fd], [], [], 0)[0]))

    def let_go(self) -> None:
        self.reader.watch()


@pytest.fixture
async def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Site]:
    force_misses(monkeypatch)
    made = Site(tmp_path)
    yield made
    await made.close()


@pytest.fixture
async def held(site: Site) -> AsyncIterator[Held]:
    made = Held()
    yield made
    made.let_go()  # what a failed test has left


async def make_linear(site: Site) -> tuple[MappedDevice, Peer]:
    device = await site.registry.create("d", linear(site, CONTENT))
    return device, await site.attach()


def count_bios(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the offset of each bio that reaches a file."""
    offsets: list[int] = []
    real = FileDevice._read_later

    def read_later(device: FileDevice, bio: object, got: int) -> None:
        offsets.append(bio.offset)  # type: ignore[attr-defined]
        real(device, bio, got)  # type: ignore[arg-type]

    monkeypatch.setattr(FileDevice, "_read_later", read_later)
    return offsets


@pytest.mark.parametrize("structured", [True, False])
async def test_batch_of_misses_makes_no_bios(
    site: Site, structured: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.registry.create("d", linear(site, CONTENT))
    peer = await site.attach(structured=structured)
    offsets = count_bios(monkeypatch)
    first = peer.cookie + 1
    peer.writer.write(
        b"".join(peer.request(c.CMD_READ, nr * 5000, 4096) for nr in range(100))
    )
    for _ in range(100):
        reply = await peer.reply()
        at = (reply.cookie - first) * 5000
        assert (reply.error, reply.data) == (0, CONTENT[at : at + 4096])
    assert not offsets


async def test_zeroes_are_answered_with_a_hole(site: Site) -> None:
    await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    reply = await peer.ask(c.CMD_READ, 0, 64 << 10)
    assert reply.chunks == (c.REPLY_TYPE_OFFSET_HOLE,)
    reply = await peer.ask(c.CMD_READ, 0, 4096)
    assert reply.data == bytes(4096)


async def test_read_counts_everywhere_until_it_has_ended(
    site: Site, held: Held
) -> None:
    device, peer = await make_linear(site)
    held.hold()
    assert site.listener is not None
    budget = site.listener.budget
    assert budget is not None
    (below,) = device.devices_below()
    peer.send(c.CMD_READ, 0, 4096)
    peer.send(c.CMD_READ, 4096, 8192)
    await held.until(2)
    counts = (
        device._path.in_flight.count,
        below.nr_in_flight,
        budget.nr_requests,
        budget.nr_bytes,
    )
    assert counts == (2, 2, 2, 12288)
    held.let_go()
    await peer.reply()
    await peer.reply()
    await until(lambda: not budget.nr_requests)
    assert (device._path.in_flight.count, below.nr_in_flight) == (0, 0)
    assert budget.nr_bytes == 0


async def test_suspend_waits_and_names_the_disk(site: Site, held: Held) -> None:
    _, peer = await make_linear(site)
    held.hold()
    peer.send(c.CMD_READ, 4096, 4096)
    await held.until(1)
    with pytest.raises(TableError, match="disk"):
        await site.registry.suspend("d", within_s=0.01)
    suspending = asyncio.create_task(site.registry.suspend("d"))
    await asyncio.sleep(0.01)
    assert not suspending.done()
    held.let_go()
    await suspending
    assert (await peer.reply()).data == CONTENT[4096:8192]


async def test_suspend_of_the_lower_of_two_devices_waits(
    site: Site, held: Held
) -> None:
    await site.registry.create("lower", linear(site, CONTENT))
    table = f"0 {SECTORS // 2} linear /dev/mapper/lower 16"
    await site.registry.create("upper", table)
    peer = await site.attach("upper")
    held.hold()
    peer.send(c.CMD_READ, 0, 4096)
    await held.until(1)
    suspending = asyncio.create_task(site.registry.suspend("lower"))
    await asyncio.sleep(0.01)
    assert not suspending.done()
    held.let_go()
    await suspending
    assert (await peer.reply()).data == CONTENT[8192:12288]


async def test_swap_closes_no_file_that_is_being_read(site: Site, held: Held) -> None:
    """The reads go on in the old table, and their replies come."""
    device, peer = await make_linear(site)
    held.hold()
    (below,) = device.devices_below()
    assert isinstance(below, FileDevice)
    for nr in range(8):
        peer.send(c.CMD_READ, nr * 4096, 4096)
    await held.until(8)
    other = site.file("other", bytes(SIZE))
    await site.registry.load("d", f"0 {SECTORS} linear {other} 0")
    resuming = asyncio.create_task(site.registry.resume("d"))
    await asyncio.sleep(0.01)
    assert below._fd >= 0
    peer.send(c.CMD_READ, 0, 4096)  # waits, and is read from the new table
    held.let_go()
    await resuming
    found = [(await peer.reply()).data for _ in range(9)]
    assert sorted(found) == sorted(
        [CONTENT[nr * 4096 : nr * 4096 + 4096] for nr in range(8)] + [bytes(4096)]
    )
    assert below._fd == -1


@pytest.mark.parametrize("how", ["the client has gone", "aborted"])
async def test_connection_that_ends_is_released_after_its_reads(
    site: Site, held: Held, how: str
) -> None:
    """Its socket may be another connection's by then: nothing may be sent there."""
    device, peer = await make_linear(site)
    held.hold()
    for nr in range(8):
        peer.send(c.CMD_READ, nr * 4096, 4096)
    await held.until(8)
    assert site.listener is not None
    (connection,) = site.listener._connections
    if how == "aborted":
        fd = connection._watch.fd
        connection.abort()
        ours, theirs = socket.socketpair()
        os.dup2(ours.fileno(), fd)  # in its place
        theirs.setblocking(False)
    else:
        peer.writer.transport.abort()
        await until(lambda: not connection._watch.is_reading)
    assert device.open_count == 1
    held.let_go()
    await until(lambda: device.open_count == 0)
    if how == "aborted":
        with pytest.raises(BlockingIOError):
            theirs.recv(1)
        theirs.close()
        if ours.fileno() != fd:
            os.close(fd)
        ours.close()


async def test_client_that_leaves_gets_its_answers_first(
    site: Site, held: Held
) -> None:
    device, peer = await make_linear(site)
    held.hold()
    peer.send(c.CMD_READ, 4096, 4096)
    peer.send(c.CMD_DISC)
    await held.until(1)
    held.let_go()
    assert (await peer.reply()).data == CONTENT[4096:8192]
    assert await peer.reader.read() == b""
    await until(lambda: device.open_count == 0)


async def test_shutdown_waits_for_the_answers(site: Site, held: Held) -> None:
    _, peer = await make_linear(site)
    held.hold()
    peer.send(c.CMD_READ, 4096, 4096)
    await held.until(1)
    assert site.listener is not None
    closing = asyncio.create_task(site.listener.close())
    await asyncio.sleep(0.01)
    assert not closing.done()
    held.let_go()
    assert (await peer.reply()).data == CONTENT[4096:8192]
    peer.close()
    await closing


async def test_read_that_comes_short_is_read_again_and_fails(site: Site) -> None:
    """The file has been cut under us: what lies behind its end is an error, and not zeroes."""
    _, peer = await make_linear(site)
    os.truncate(site.folder / "disk", SIZE // 2)
    assert (await peer.ask(c.CMD_READ, SIZE - 8192, 4096)).error == errnos.EIO
    assert (await peer.ask(c.CMD_READ, 0, 4096)).data == CONTENT[:4096]


async def test_failed_read_of_a_suspended_device_waits_for_the_resume(
    site: Site, held: Held
) -> None:
    _, peer = await make_linear(site)
    held.hold()
    os.truncate(site.folder / "disk", SIZE // 2)
    peer.send(c.CMD_READ, SIZE - 8192, 4096)
    await held.until(1)
    suspending = asyncio.create_task(site.registry.suspend("d"))
    await asyncio.sleep(0.01)
    os.truncate(site.folder / "disk", SIZE + 4096)
    held.let_go()
    await suspending
    await site.registry.resume("d")
    assert (await peer.reply()).data == bytes(4096)


async def test_bounds_of_a_connection_hold(site: Site, held: Held) -> None:
    """It is paused when they are met, and goes on when reads have ended."""
    site.limits = Limits(
        requests_in_flight_max=4, bytes_in_flight_max=1 << 20, poison_borrowed=True
    )
    _, peer = await make_linear(site)
    held.hold()
    peer.writer.write(
        b"".join(peer.request(c.CMD_READ, nr * 4096, 4096) for nr in range(50))
    )
    await held.until(4)
    await asyncio.sleep(0.01)
    assert site.nr_in_flight() == 4
    held.let_go()
    for _ in range(50):
        assert (await peer.reply()).error == 0


async def test_connections_share_the_budget(site: Site, held: Held) -> None:
    site.limits = Limits(requests_in_flight_max=4, requests_total_max=6)
    _, peer = await make_linear(site)
    held.hold()
    other = await site.attach()
    for each in (peer, other):
        each.writer.write(
            b"".join(each.request(c.CMD_READ, nr * 4096, 4096) for nr in range(20))
        )
    await held.until(6)
    await asyncio.sleep(0.01)
    assert site.nr_in_flight() <= 7  # one more, with a bio
    held.let_go()
    for each in (peer, other):
        for _ in range(20):
            assert (await each.reply()).error == 0


async def test_replies_wait_behind_what_the_client_has_not_read(site: Site) -> None:
    """Then they go through the queue, and count until they have left."""
    site.limits = Limits(socket_buffer=4096, poison_borrowed=True)
    _, peer = await make_linear(site)
    first = peer.cookie + 1
    peer.writer.write(
        b"".join(peer.request(c.CMD_READ, nr * 16384, 60_000) for nr in range(200))
    )
    await asyncio.sleep(0.05)
    for _ in range(200):
        reply = await peer.reply()
        at = (reply.cookie - first) * 16384
        assert reply.data == CONTENT[at : at + 60_000]
    assert site.listener is not None
    budget = site.listener.budget
    assert budget is not None
    await until(lambda: not budget.nr_bytes)


async def test_ring_that_is_full_leaves_the_rest_to_bios(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ring, "_readers", {})
    monkeypatch.setattr(ring, "READS_MAX", 4)
    held = Held()
    _, peer = await make_linear(site)
    held.hold()
    peer.writer.write(
        b"".join(peer.request(c.CMD_READ, nr * 4096, 4096) for nr in range(50))
    )
    await held.until(4)
    held.let_go()
    for _ in range(50):
        assert (await peer.reply()).error == 0


async def test_half_hydrated_clone_reads_each_region_where_it_lies(
    site: Site, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = clone(site, CONTENT).replace(" 0 4 ", " 1 no_hydration 4 ")
    device = await site.registry.create("d", table)
    peer = await site.attach()
    await peer.ask(c.CMD_WRITE, 0, payload=b"w" * BLOCK)  # hydrates the first one
    held.hold()
    offsets = count_bios(monkeypatch)
    peer.send(c.CMD_READ, 0, 4096)
    peer.send(c.CMD_READ, BLOCK, 4096)
    await held.until(2)
    assert [below.nr_in_flight for below in device.devices_below()][1:] == [1, 1]
    held.let_go()
    found = {(await peer.reply()).data for _ in range(2)}
    assert found == {b"w" * 4096, CONTENT[BLOCK : BLOCK + 4096]}
    assert not offsets


async def test_block_of_a_cache_is_held_while_it_is_read(
    site: Site, held: Held, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache block that is used for another one meanwhile would show that one's bytes."""
    device = await site.registry.create("d", cache(site, CONTENT))
    peer = await site.attach()
    await device.message(0, ["pin", "0"])
    assert device.active is not None
    target = device.active.targets[0]
    await until(lambda: bool(target.status_fields()["pinned_blocks"]))
    locks = target._locks  # type: ignore[attr-defined]
    await peer.ask(c.CMD_READ, 4096, 4096)  # the first hit of a period is noted
    await until(lambda: not locks.nr_holds)
    held.hold()
    offsets = count_bios(monkeypatch)
    peer.send(c.CMD_READ, 4096, 4096)
    await held.until(1)
    assert not offsets
    assert locks._readers == {0: 1}
    raised: list[object] = []
    lock = locks.maybe_lock(0, lambda _: None)
    locks.raise_level(lock, raised.append)
    assert not raised
    held.let_go()
    assert (await peer.reply()).data == CONTENT[4096:8192]
    await until(lambda: bool(raised))
    for bio in locks.unlock(lock):
        target._remap(bio)  # type: ignore[attr-defined]
    assert locks.nr_holds == 0


async def test_replies_leave_in_the_order_in_which_they_are_there(
    site: Site, held: Held
) -> None:
    """The queue may begin with the rest of a reply, so later replies wait behind it."""
    _, peer = await make_linear(site)
    held.hold()
    peer.send(c.CMD_READ, 4096, 4096)
    await held.until(1)
    await held.until_ended()
    assert site.listener is not None
    (connection,) = site.listener._connections
    connection._output.push(c.SIMPLE_REPLY.pack(c.SIMPLE_REPLY_MAGIC, 0, 77))
    held.reader._reap()
    assert (await peer.reply()).cookie == 77
    assert (await peer.reply()).data == CONTENT[4096:8192]
