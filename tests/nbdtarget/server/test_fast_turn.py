# SPDX-License-Identifier: Apache-2.0
"""Whole servers over real files, with the compiled fast path and without it: both are one disk.

Each conversation is random, by a seed: batches of every kind of request, and between and during them
suspends, table swaps and messages. What is read is held against a model, and so is what lies in the files in the
end. A failing seed is in the name of the test; CONVERSATIONS=100 in the environment has so many seeds tried.
"""

import asyncio
import errno as errnos
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.bio import Bio
from nbdtarget.common import tls_socket
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.fast import compiled
from nbdtarget.fast.compiled import FastFile
from nbdtarget.policies.smq.policy import Smq
from nbdtarget.server.flow import Flow
from nbdtarget.server.limits import Limits
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_protocol import consts as c
from tests.support.certificates import needs_openssl
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import Peer, Reply
from tests.support.site import (
    BLOCK,
    SECTORS,
    SIZE,
    TABLES,
    Site,
    cache,
    clone,
    force_misses,
    linear,
)

needs_compiled = pytest.mark.skipif(
    not compiled.IS_COMPILED, reason=compiled.describe()
)

BATCH_MAX: Final = 40
NR_SEEDS: Final = int(os.environ.get("CONVERSATIONS", "2"))


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    yield made
    await made.close()


@pytest.fixture(
    params=[
        "plain",
        pytest.param("tls", marks=needs_openssl),
        pytest.param("tls in python", marks=[needs_openssl, pytest.mark.long]),
    ]
)
async def any_site(
    tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Site]:
    """A site whose clients talk in the clear, or in TLS that compiled code carries, or Python."""
    if request.param == "tls in python":
        monkeypatch.setattr(tls_socket, "_take_over", lambda *_: None)
    made = Site(tmp_path, tls=request.param != "plain")
    yield made
    await made.close()


# ---- conversations ----


class Conversation:
    """Random batches, and what they must do to a disk."""

    def __init__(self, seed: int, content: bytes) -> None:
        self.random = random.Random(seed)
        self.model = bytearray(content)
        self.expected: dict[int, tuple[int, bytes]] = {}  # by cookie: error, data

    def _ranges(self) -> list[tuple[int, int]]:
        """Places that do not overlap: the order inside of a batch is the server's to choose."""
        at = 0
        ranges: list[tuple[int, int]] = []
        pick = self.random
        while len(ranges) < pick.randint(1, BATCH_MAX):
            at += pick.choice((0, 512, 4096, 60_000, 200_000))
            longest = pick.choice((512, 4096, 4096, 9000, BLOCK, 150_000, 300_000))
            length = pick.randint(1, longest) if pick.random() < 0.3 else longest
            if at + length > SIZE:
                break
            ranges.append((at, length))
            at += length
        pick.shuffle(ranges)
        return ranges

    def batch(self, peer: Peer) -> bytes:
        """Encode a batch, and note what its replies must say."""
        self.expected.clear()
        wire = bytearray()
        for offset, length in self._ranges():
            wire += self._request(peer, offset, length)
        return bytes(wire)

    def _request(self, peer: Peer, offset: int, length: int) -> bytes:
        pick, model = self.random, self.model
        kind = pick.choices(
            ("read", "write", "fua", "flush", "zero", "outside", "odd"),
            (40, 40, 4, 3, 4, 2, 2),
        )[0]
        here = slice(offset, offset + length)
        if kind == "read":
            encoded = peer.request(c.CMD_READ, offset, length)
            self.expected[peer.cookie] = 0, bytes(model[here])
            return encoded
        if kind in ("write", "fua"):
            data = bytes(length) if pick.random() < 0.1 else pick.randbytes(length)
            model[here] = data
            flags = c.CMD_FLAG_FUA if kind == "fua" else 0
            encoded = peer.request(c.CMD_WRITE, offset, payload=data, flags=flags)
        elif kind == "zero":
            model[here] = bytes(length)
            encoded = peer.request(c.CMD_WRITE_ZEROES, offset, length)
        elif kind == "flush":
            encoded = peer.request(c.CMD_FLUSH)
        elif kind == "outside":
            encoded = peer.request(c.CMD_READ, SIZE - 512, 1024)
            self.expected[peer.cookie] = errnos.EINVAL, b""
            return encoded
        else:
            encoded = peer.request(77, offset, length)
            self.expected[peer.cookie] = errnos.EINVAL, b""
            return encoded
        self.expected[peer.cookie] = 0, b""
        return encoded

    async def send(self, peer: Peer, wire: bytes) -> None:
        """In pieces of any length, as a network would."""
        at = 0
        while at < len(wire):
            step = self.random.choice((7, 1000, 30_000, 1 << 20, 1 << 20))
            peer.writer.write(wire[at : at + step])
            at += step
            if self.random.random() < 0.3:
                await asyncio.sleep(0)
        await peer.writer.drain()

    def check(self, reply: Reply) -> None:
        error, data = self.expected.pop(reply.cookie)
        assert reply.error == error
        assert reply.data == data


async def disturb(site: Site, pick: random.Random, table: str) -> None:
    """Something that an operator does while clients are at work."""
    for _ in range(pick.randint(0, 3)):
        await asyncio.sleep(pick.choice((0, 0, 0.001, 0.005)))
        action = pick.choice(("suspend", "swap", "status", "count"))
        device = site.registry.get("d")
        if action == "suspend":
            await site.registry.suspend("d", noflush=pick.random() < 0.5)
            await site.registry.resume("d")
        elif action == "swap":
            await site.registry.load("d", table)
            await site.registry.suspend("d")
            await site.registry.resume("d")
        elif action == "status":
            await device.status()
        else:
            region = await device.message(0, ["@stats_create", "-", "/1"])
            await asyncio.sleep(0)
            await device.message(0, ["@stats_delete", str(region)])


HOW: Final = ("simple", "structured", "extended")


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("seed", range(NR_SEEDS))
async def test_conversations_read_what_was_written(
    any_site: Site, name: str, seed: int, how: str
) -> None:
    await converse(any_site, name, seed, how)


@needs_compiled
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("name", TABLES)
@pytest.mark.parametrize("seed", range(NR_SEEDS // 2))
async def test_conversations_whose_reads_miss_the_page_cache(
    any_site: Site, name: str, seed: int, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of three are in the ring while the table is suspended and swapped."""
    force_misses(monkeypatch, (1 << 33) // 3)
    await converse(any_site, name, seed, how)


async def converse(site: Site, name: str, seed: int, how: str) -> None:
    pick = random.Random(f"{name} {seed}")
    content = pick.randbytes(SIZE // 2) + bytes(SIZE // 2)
    table = TABLES[name](site, content)
    device = await site.registry.create("d", table)
    talk = Conversation(pick.randrange(1 << 30), content)
    peer = await site.attach(structured=how != "simple", extended=how == "extended")
    for _ in range(6):
        wire = talk.batch(peer)
        disturbed = asyncio.create_task(disturb(site, pick, table))
        sending = asyncio.create_task(talk.send(peer, wire))
        async with asyncio.timeout(PATIENCE_S):
            while talk.expected:
                talk.check(await peer.reply())
        await sending
        await disturbed
    peer.close()
    assert bytes(await device.read(0, SIZE)) == talk.model


@needs_compiled
@pytest.mark.parametrize(
    "any_site", ["plain", pytest.param("tls", marks=needs_openssl)], indirect=True
)
@pytest.mark.parametrize("extended", [False, True])
@pytest.mark.parametrize("name", ["linear", "clone", "cache"])
async def test_plain_requests_take_the_compiled_path(
    any_site: Site, name: str, extended: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = os.urandom(SIZE)
    device = await any_site.registry.create("d", TABLES[name](any_site, content))
    peer = await any_site.attach(extended=extended)
    for _ in range(3):  # so that it is in the page cache, and in the cache
        for at in range(0, SIZE // 2, BLOCK):
            await peer.ask(c.CMD_READ, at, BLOCK)
    if name == "clone":
        await _hydrated(device)
    elif name == "cache":
        await _pinned(device)
        await peer.ask(c.CMD_READ, 4096, 4096)  # the first hit of a period is noted
    # From here on a request that reaches the target fails.
    monkeypatch.setattr(type(device.active.targets[0]), "map", None)  # type: ignore[union-attr]
    device.fast_path._map = None  # type: ignore[assignment]
    reply = await peer.ask(c.CMD_READ, 4096, 4096)
    assert reply.data == content[4096:8192]
    if name == "linear":
        # Whether it says that it has a payload, as it should, or not, as QEMU does.
        assert (await peer.ask(c.CMD_WRITE, 4096, payload=b"x" * 512)).error == 0
        peer.writer.write(peer.request(c.CMD_WRITE, 8192, 512) + b"y" * 512)
        assert (await peer.reply()).error == 0
        data = (await peer.ask(c.CMD_READ, 4096, 8192)).data
        assert (data[:512], data[4096:4608]) == (b"x" * 512, b"y" * 512)


async def _hydrated(device: MappedDevice) -> None:
    while not (await device.status())[0][3].split()[3].startswith("64/"):  # noqa: ASYNC110
        await asyncio.sleep(0.01)


async def _pinned(device: MappedDevice) -> None:
    """Have the first block cached."""
    assert device.active is not None
    target = device.active.targets[0]
    await device.message(0, ["pin", "0"])
    async with asyncio.timeout(PATIENCE_S):
        while not target.status_fields()["pinned_blocks"]:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.1)


# ---- routes: open exactly while requests may take them ----


@needs_compiled
async def test_suspended_device_has_no_route(site: Site) -> None:
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    route = device.maybe_route()
    assert route is not None
    await site.registry.suspend("d")
    assert device.maybe_route() is None
    assert not route.can_read  # and the old one leads nowhere
    await site.registry.resume("d")
    assert device.maybe_route() is not None


@needs_compiled
async def test_counted_device_has_no_route(site: Site) -> None:
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    region = await device.message(0, ["@stats_create", "-", "/1"])
    assert device.maybe_route() is None
    await device.message(0, ["@stats_delete", str(region)])
    assert device.maybe_route() is not None


@needs_compiled
async def test_read_only_table_lets_nothing_be_written(site: Site) -> None:
    table = linear(site, bytes(SIZE))
    device = await site.registry.create("d", table, read_only=True)
    route = device.maybe_route()
    assert route is not None
    assert route.is_read_only


@needs_compiled
async def test_linear_on_linear_leads_to_the_file_of_the_lower(site: Site) -> None:
    await site.registry.create("lower", linear(site, bytes(SIZE)))
    table = f"0 {SECTORS // 2} linear /dev/mapper/lower 16"
    upper = await site.registry.create("upper", table)
    assert upper.maybe_route() is not None
    await site.registry.suspend("lower")
    assert upper.maybe_route() is None
    await site.registry.resume("lower")
    assert upper.maybe_route() is not None


@needs_compiled
async def test_failed_clone_lets_nothing_pass(site: Site) -> None:
    device = await site.registry.create("d", clone(site, os.urandom(SIZE)))
    route = device.maybe_route()
    assert route is not None
    assert route.can_read
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, CloneTarget)
    target._broken(RuntimeError("planted"))
    assert not route.can_read
    assert not route.can_write


@needs_compiled
async def test_hydrate_on_read_is_told_of_what_clients_read(site: Site) -> None:
    table = clone(site, os.urandom(SIZE))
    table = table.replace(" 0 4 ", " 2 no_hydration hydrate_on_read 4 ")
    device = await site.registry.create("d", table)
    route = device.maybe_route()
    assert route is not None
    assert not route.can_read_other
    await device.message(0, ["disable_hydrate_on_read"])
    assert route.can_read_other
    await device.message(0, ["enable_hydrate_on_read"])
    assert not route.can_read_other


@needs_compiled
async def test_reads_of_a_clone_count_as_client_io(site: Site) -> None:
    """Hydration gives way to clients, whichever way their requests take."""
    table = clone(site, os.urandom(SIZE)).replace(" 0 4 ", " 1 no_hydration 4 ")
    device = await site.registry.create("d", table)
    peer = await site.attach()
    await peer.ask(c.CMD_READ, 0, 4096)  # into the page cache
    target = device.active.targets[0]  # type: ignore[union-attr]
    assert isinstance(target, CloneTarget)
    before = target._regions.nr_bios
    await peer.ask(c.CMD_READ, 0, 4096)
    assert target._regions.nr_bios == before + 1


@needs_compiled
async def test_reads_of_a_hydrated_clone_need_no_python(site: Site) -> None:
    device = await site.registry.create("d", clone(site, os.urandom(SIZE)))
    await until(lambda: getattr(device.maybe_route(), "was_served", 0) is None)


@needs_compiled
async def test_hits_of_a_cache_are_counted(site: Site) -> None:
    device = await site.registry.create("d", cache(site, os.urandom(SIZE)))
    peer = await site.attach()
    await _pinned(device)
    for _ in range(3):
        await peer.ask(c.CMD_READ, 0, 4096)
    before = _hits(device)
    for _ in range(5):
        await peer.ask(c.CMD_READ, 0, 4096)
    assert _hits(device) == before + 5


@needs_compiled
async def test_first_hit_of_a_period_is_told_to_the_policy(site: Site) -> None:
    """It needs no bio for that."""
    device = await site.registry.create("d", cache(site, os.urandom(SIZE)))
    peer = await site.attach()
    await _pinned(device)
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, CacheTarget)
    policy = target._blocks.policy
    assert isinstance(policy, Smq)
    (cblock,) = [
        nr for nr in range(len(policy._is_hit)) if policy.lookup(0, False) == nr
    ]
    before = policy._nr_hit
    policy._is_hit[cblock] = 0
    target.map = None  # type: ignore[assignment,method-assign]
    device.fast_path._map = None  # type: ignore[assignment]
    await peer.ask(c.CMD_READ, 0, 4096)
    await peer.ask(c.CMD_READ, 0, 4096)
    assert policy._is_hit[cblock]
    assert policy._nr_hit == before + 1


def _hits(device: MappedDevice) -> int:
    assert device.active is not None
    hits = device.active.targets[0].status_fields()["read_hits"]
    assert isinstance(hits, int)
    return hits


# ---- a disk that fails ----


async def _served_file(site: Site) -> tuple[FileDevice, FastFile]:
    """Make a `linear` device "d" on a file of zeroes; return the file, and the compiled path's end of it."""
    disk = site.file("disk", bytes(SIZE))
    device = await site.registry.create("d", f"0 {SECTORS} linear {disk} 0")
    (below,) = device.devices_below()
    assert isinstance(below, FileDevice)
    file = below.maybe_fast_file()
    assert file is not None
    return below, file


@needs_compiled
async def test_write_that_the_page_cache_refuses_fails_and_latches(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel tells some errors once, so the write is not tried again."""
    below, file = await _served_file(site)
    peer = await site.attach()
    tried: list[int] = []

    def pwrite(fd: int, data: bytes, offset: int) -> int:
        tried.append(offset)
        return len(data)

    monkeypatch.setattr("nbdtarget.devices.file.device._pwrite", pwrite)
    below._note_unfinished(8192, 4096, 0, errnos.EIO, 0)
    file.write_max = 0
    reply = await peer.ask(c.CMD_WRITE, 8192, payload=bytes(4096))
    assert reply.error == errnos.EIO
    assert tried == []
    assert (await peer.ask(c.CMD_FLUSH)).error == errnos.EIO


@needs_compiled
async def test_write_that_was_taken_in_part_is_finished(site: Site) -> None:
    below, file = await _served_file(site)
    peer = await site.attach()
    below._note_unfinished(8192, 4096, 1024, 0, 0)
    file.write_max = 0
    reply = await peer.ask(c.CMD_WRITE, 8192, payload=b"w" * 4096)
    assert reply.error == 0
    data = (await peer.ask(c.CMD_READ, 8192, 4096)).data
    assert data == bytes(1024) + b"w" * 3072  # the first part was there already


@needs_compiled
async def test_error_of_a_later_piece_is_not_lost_on_the_pieces_before(
    site: Site,
) -> None:
    below, file = await _served_file(site)
    peer = await site.attach()
    below._note_unfinished(8192, 4096, 0, errnos.EIO, 1)
    file.write_max = 0
    before = await peer.ask(c.CMD_WRITE, 0, payload=b"w" * 4096)
    assert (before.error, file.write_max) == (0, 0)
    reply = await peer.ask(c.CMD_WRITE, 8192, payload=bytes(4096))
    assert reply.error == errnos.EIO
    assert (await peer.ask(c.CMD_FLUSH)).error == errnos.EIO


@needs_compiled
async def test_error_of_a_write_that_is_not_asked_for_again_is_not_forgotten(
    site: Site,
) -> None:
    below, file = await _served_file(site)
    peer = await site.attach()
    below._note_unfinished(8192, 4096, 0, errnos.EIO, 0)
    file.write_max = 0
    reply = await peer.ask(c.CMD_WRITE, 0, payload=b"w" * 4096)
    assert reply.error == 0
    assert (await peer.ask(c.CMD_FLUSH)).error == errnos.EIO


@needs_compiled
async def test_slow_write_is_the_last_one_for_now(site: Site) -> None:
    below, file = await _served_file(site)
    assert file.write_max > 0
    below._watch()
    assert file.write_max == 0


@needs_compiled
async def test_discard_keeps_writes_from_the_compiled_path(site: Site) -> None:
    """It holds the inode's lock: a write would wait for it in the event loop."""
    _, file = await _served_file(site)
    peer = await site.attach()
    peer.send(c.CMD_TRIM, 0, BLOCK)
    await peer.writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        while file.write_max:  # noqa: ASYNC110
            await asyncio.sleep(0)
    await peer.reply()
    async with asyncio.timeout(PATIENCE_S):
        while not file.write_max:  # noqa: ASYNC110
            await asyncio.sleep(0)


# ---- connections ----


async def test_peer_that_leaves_in_the_middle_of_a_batch_is_released(
    any_site: Site,
) -> None:
    device = await any_site.registry.create("d", linear(any_site, bytes(SIZE)))
    peer = await any_site.attach()
    wire = b"".join(peer.request(c.CMD_READ, 0, 4096) for _ in range(2000))
    peer.writer.write(wire[:-5])
    await peer.writer.drain()
    peer.close()
    async with asyncio.timeout(PATIENCE_S):
        while device.open_count:  # noqa: ASYNC110
            await asyncio.sleep(0.001)


async def test_bad_magic_behind_a_batch_ends_the_connection(any_site: Site) -> None:
    await any_site.registry.create("d", linear(any_site, bytes(SIZE)))
    peer = await any_site.attach()
    good = peer.request(c.CMD_READ, 0, 512)
    peer.writer.write(good + peer.request(c.CMD_READ, 0, 512, magic=0x12345678))
    errors = await peer.errors_to_the_end()
    assert errors in ([0], [])


async def test_client_that_does_not_read_is_served_when_it_does(any_site: Site) -> None:
    content = os.urandom(SIZE)
    await any_site.registry.create("d", linear(any_site, content))
    peer = await any_site.attach()
    offsets = [(nr * 4096) % (SIZE - 4096) for nr in range(3000)]
    wire = b"".join(peer.request(c.CMD_READ, at, 4096) for at in offsets)
    first = peer.cookie - len(offsets) + 1
    sending = asyncio.create_task(_send(peer, wire))
    await asyncio.sleep(0.2)
    async with asyncio.timeout(PATIENCE_S):
        for _ in offsets:
            reply = await peer.reply()
            at = offsets[reply.cookie - first]
            assert reply.data == content[at : at + 4096]
    await sending


async def _send(peer: Peer, wire: bytes) -> None:
    peer.writer.write(wire)
    await peer.writer.drain()


async def test_shutdown_refuses_what_comes_later(any_site: Site) -> None:
    await any_site.registry.create("d", linear(any_site, bytes(SIZE)))
    peer = await any_site.attach()
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
    assert any_site.listener is not None
    closing = asyncio.create_task(any_site.listener.close())
    await asyncio.sleep(0)
    wire = b"".join(peer.request(c.CMD_READ, 0, 512) for _ in range(5))
    peer.writer.write(wire)
    errors = await peer.errors_to_the_end()
    assert set(errors) <= {errnos.ESHUTDOWN}
    await closing


@needs_compiled
async def test_shutdown_is_seen_by_the_next_request(site: Site) -> None:
    await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    assert (await peer.ask(c.CMD_WRITE, 0, payload=b"old")).error == 0
    assert site.listener is not None
    (connection,) = site.listener._connections
    assert connection._reception is not None
    connection.shutdown()
    peer.send(c.CMD_WRITE, 0, payload=b"new")
    connection._reception.reader()  # as the loop does, before anything else has run
    assert (await peer.reply()).error == errnos.ESHUTDOWN


async def test_file_that_has_shrunk_is_not_written_behind_its_end(site: Site) -> None:
    """A load looks at the size of the file: what lies behind it is an error, and does not make the file long again."""
    disk = site.file("disk", bytes(SIZE))
    await site.registry.create("d", f"0 {SECTORS} linear {disk} 0")
    peer = await site.attach()
    assert (await peer.ask(c.CMD_WRITE, 0, payload=bytes(4096))).error == 0
    os.truncate(disk, SIZE // 2)
    await site.registry.load("d", f"0 {SECTORS // 2} linear {disk} 0")
    reply = await peer.ask(c.CMD_WRITE, SIZE - 4096, payload=bytes(4096))
    assert reply.error == errnos.ENOSPC
    assert os.stat(disk).st_size == SIZE // 2
    assert (await peer.ask(c.CMD_READ, SIZE - 4096, 4096)).error == errnos.EINVAL


async def test_requests_pass_the_gate_as_soon_as_there_is_one(site: Site) -> None:
    """It holds back what must not overtake the writes of an older connection."""
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    assert (await peer.ask(c.CMD_WRITE, 0, payload=b"old")).error == 0
    assert site.listener is not None
    (connection,) = site.listener._connections
    held: list[Bio] = []

    def hold(bio: Bio) -> None:
        bio.own()
        held.append(bio)

    connection.route(hold)
    peer.send(c.CMD_WRITE, 0, payload=b"new")
    await peer.writer.drain()
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(100):
            await asyncio.sleep(0)
            if held:
                break
    assert (await device.read(0, 3)).tobytes() == b"old"
    (bio,) = held
    connection.route(device.submit)
    device.submit(bio)
    assert (await peer.reply()).error == 0


async def test_read_longer_than_allowed_is_refused(site: Site) -> None:
    site.limits = Limits(payload_max=64 << 10)
    await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    assert (await peer.ask(c.CMD_READ, 0, 64 << 10)).error == 0
    assert (await peer.ask(c.CMD_READ, 0, 65 << 10)).error == errnos.EINVAL
    data = bytes(65 << 10)
    assert (await peer.ask(c.CMD_WRITE, 0, payload=data)).error == errnos.EINVAL


@needs_compiled
async def test_requests_that_python_serves_leave_others_their_turn(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full receive buffer of misses is hundreds of milliseconds of work."""
    site.limits = Limits(turn_us=1)
    device = await site.registry.create("d", cache(site, os.urandom(SIZE)))
    peer = await site.attach()
    assert device.maybe_route() is not None
    for at in range(60):  # into the page cache
        assert (await peer.ask(c.CMD_READ, BLOCK * at, 1)).error == 0
    nr_given_way = 0
    give_way = Flow.give_way

    def count(flow: Flow) -> None:
        nonlocal nr_given_way
        nr_given_way += 1
        give_way(flow)

    monkeypatch.setattr(Flow, "give_way", count)
    nr = 500
    wire = b"".join(peer.request(c.CMD_READ, BLOCK * (at % 60), 1) for at in range(nr))
    await _send(peer, wire)
    async with asyncio.timeout(PATIENCE_S):
        for _ in range(nr):
            assert (await peer.reply()).error == 0
    assert nr_given_way > nr // 4


async def test_large_write_behind_a_turn_that_is_over_is_received(site: Site) -> None:
    """It is larger than the bound of its connection, and nothing else is in flight that would end."""
    site.limits = Limits(turn_us=1, bytes_in_flight_max=64 << 10)
    await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach()
    wire = peer.request(c.CMD_FLUSH)
    wire += peer.request(c.CMD_WRITE, 0, payload=b"w" * (600 << 10))
    await _send(peer, wire)
    async with asyncio.timeout(PATIENCE_S):
        assert (await peer.reply()).error == 0
        assert (await peer.reply()).error == 0
