# SPDX-License-Identifier: Apache-2.0
"""NbdDevice against a strict server: what it asks, and what it makes of what it is told."""

import asyncio
import contextlib
import errno
import os
import random
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdtarget.bio import (
    FAST_ZERO,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO, Extent
from nbdtarget.devices.nbd import block_status
from nbdtarget.devices.nbd import connect as nbd_connect
from nbdtarget.devices.nbd import connection as nbd_connection
from nbdtarget.devices.nbd import device as nbd_module
from nbdtarget.devices.nbd.device import IN_FLIGHT_MAX, NbdDevice, open_nbd
from nbdtarget.devices.nbd.uri import CONNECTIONS
from nbdtarget.devices.resolve import identity, open_device
from nbdtarget_protocol import consts
from tests.support.nbd_device import SIZE, bio_of, device_of
from tests.support.nbd_server import FLAGS_ALL, StrictServer
from tests.support.patience import PATIENCE_S, attempts, until


@pytest.mark.parametrize("block_min", [1, 512, 4096])
@pytest.mark.parametrize("flags", [FLAGS_ALL, consts.FLAG_HAS_FLAGS | 1 << 2])
@pytest.mark.parametrize("seed", range(2))
async def test_it_is_an_array_of_bytes(
    tmp_path: Path, block_min: int, flags: int, seed: int
) -> None:
    rng = random.Random(seed)
    model = bytearray(SIZE)
    async with StrictServer(
        tmp_path, flags=flags, block_min=block_min, payload_max=65536
    ) as server:
        device = await device_of(server)
        for _ in range(60):
            offset = rng.randrange(SIZE)
            length = min(rng.choice([1, 512, 4096, 5000, 200_000]), SIZE - offset)
            data = rng.randbytes(length)
            fua = rng.random() < 0.3
            if rng.random() < 0.3:
                data = bytes(length)
                await device.write_zeroes(offset, length, fua=fua)
            else:
                await device.write(offset, data, fua=fua)
            model[offset : offset + length] = data
            found = await device.read(offset, length)
            assert bytes(found) == model[offset : offset + length]
        assert server.disk == model
        await device.close()


async def test_unaligned_writes_at_once_lose_nothing_of_each_other(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path, block_min=4096) as server:
        device = await device_of(server)
        writes = [
            device.write(at, bytes([at // 100 + 1]) * 100) for at in range(0, 9000, 100)
        ]
        writes.append(device.write(12288, b"z" * 4096))
        await asyncio.gather(*writes)
        expected = b"".join(bytes([nr + 1]) * 100 for nr in range(90))
        assert server.disk[:9000] == expected
        assert server.disk[12288:16384] == b"z" * 4096
        await device.close()


async def test_borrowed_payloads_are_owned(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        buffer = bytearray(b"a" * 4096)
        view = memoryview(buffer)
        write = Bio(OP_WRITE, 0, 4096, view, 0, lambda _: None, borrowed=True)
        device.submit(write)
        buffer[:] = b"b" * 4096
        await until(lambda: write.status == 0)
        read = Bio(OP_READ, 0, 4096, view, 0, lambda _: None, borrowed=True)
        device.submit(read)
        await until(lambda: read.status == 0)
        assert buffer == b"b" * 4096
        assert bytes(read.payload or b"") == b"a" * 4096
        await device.close()


async def test_borrowed_payloads_are_owned_when_they_wait_their_turn(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.gate.clear()
        buffer, bios = bytearray(512), []
        for nr in range(2 * IN_FLIGHT_MAX):
            buffer[:] = bytes([nr + 1]) * 512
            view, at = memoryview(buffer), nr * 512
            bios.append(Bio(OP_WRITE, at, 512, view, 0, lambda _: None, borrowed=True))
            device.submit(bios[-1])
        server.gate.set()
        await until(lambda: all(bio.status == 0 for bio in bios))
        for nr in range(len(bios)):
            assert server.disk[nr * 512 : (nr + 1) * 512] == bytes([nr + 1]) * 512
        await device.close()


async def test_part_of_a_block_is_patched_when_no_write_is_under_way(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path, block_min=4096) as server:
        device = await device_of(server)
        server.gate.clear()
        whole, part = bio_of(OP_WRITE, 0, 4096), bio_of(OP_WRITE, 512, 512)
        device.submit(whole)
        device.submit(part)
        for _ in range(100):
            await asyncio.sleep(0)
        assert server.commands() == [consts.CMD_WRITE]
        server.gate.set()
        await until(lambda: whole.status == part.status == 0)
        await device.close()


class Once(dict[int, int]):
    """An error for the first request of a command only."""

    def get(self, command: int, default: int = 0) -> int:  # type: ignore[override]  # narrower
        return self.pop(command, default)


@pytest.mark.parametrize("command", [consts.CMD_READ, consts.CMD_WRITE])
async def test_error_of_one_piece_is_the_error_of_the_bio(
    tmp_path: Path, command: int
) -> None:
    async with StrictServer(tmp_path, payload_max=65536) as server:
        device = await device_of(server)
        server.errors = Once({command: errno.EIO})
        bio = bio_of(OP_READ if command == consts.CMD_READ else OP_WRITE, 0, 300_000)
        device.submit(bio)
        await until(lambda: bio.status >= 0)
        assert bio.status == errno.EIO
        await device.close()


async def test_requests_beyond_the_bound_wait(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=FLAGS_ALL ^ 1 << 8) as server:
        device = await device_of(server)
        server.gate.clear()
        bios = [bio_of(OP_READ, 0, 512) for _ in range(3 * IN_FLIGHT_MAX)]
        for bio in bios:
            device.submit(bio)
        assert sum(c.in_flight for c in device._connections) == IN_FLIGHT_MAX
        server.gate.set()
        await until(lambda: all(bio.status == 0 for bio in bios))
        await device.close()


async def test_flushes_that_come_while_one_runs_share_the_next(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.gate.clear()
        bios = [bio_of(OP_FLUSH, 0, 0) for _ in range(10)]
        for bio in bios:
            device.submit(bio)
        server.gate.set()
        await until(lambda: all(bio.status == 0 for bio in bios))
        assert server.commands() == [consts.CMD_FLUSH] * 2
        await device.close()


async def test_fua_is_asked_of_the_server(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device.write(0, b"x", fua=True)
        assert server.noted == [(consts.CMD_WRITE, consts.CMD_FLAG_FUA, 0, 1)]
        await device.close()


async def test_fua_is_a_flush_afterwards_without_it(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=FLAGS_ALL ^ 1 << 3) as server:
        device = await device_of(server)
        await device.write(0, b"x", fua=True)
        await device.write_zeroes(0, 512, fua=True)
        assert server.commands() == [
            consts.CMD_WRITE,
            consts.CMD_FLUSH,
            consts.CMD_WRITE_ZEROES,
            consts.CMD_FLUSH,
        ]
        await device.close()


@pytest.mark.parametrize(
    ("command", "code", "latches"),
    [
        (consts.CMD_FLUSH, errno.EIO, True),
        (consts.CMD_WRITE, errno.EIO, True),
        (consts.CMD_WRITE, errno.ENOSPC, False),
        (consts.CMD_READ, errno.EIO, False),
        # A discard promises nothing: it fails alone.
        (consts.CMD_TRIM, errno.EIO, False),
        (consts.CMD_TRIM, errno.EINVAL, False),
    ],
)
async def test_server_errors_latch_as_a_file_would(
    tmp_path: Path, command: int, code: int, latches: bool
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.errors[command] = code
        operations: dict[int, Callable[[], Awaitable[object]]] = {
            consts.CMD_FLUSH: device.flush,
            consts.CMD_WRITE: lambda: device.write(0, b"x"),
            consts.CMD_READ: lambda: device.read(0, 1),
            consts.CMD_TRIM: lambda: device.discard(0, 4096),
        }
        with pytest.raises(DeviceError) as caught:
            await operations[command]()
        assert caught.value.errno == code
        server.errors.clear()
        if latches:
            with pytest.raises(DeviceError):
                await device.flush()
            with pytest.raises(DeviceError):
                await device.write(0, b"x", fua=True)
        else:
            await device.flush()
        assert bytes(await device.read(0, 1)) == b"\0"
        await device.close()


async def test_shutdown_of_the_server_is_an_io_error(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.errors[consts.CMD_READ] = errno.ESHUTDOWN
        with pytest.raises(DeviceError) as caught:
            await device.read(0, 1)
        assert caught.value.errno == errno.EIO
        await device.close()


async def test_fast_zero_that_the_server_lacks_is_refused(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=FLAGS_ALL ^ 1 << 11) as server:
        device = await device_of(server)
        bio = bio_of(OP_WRITE_ZEROES, 0, 512, FAST_ZERO)
        device.submit(bio)
        assert bio.status == errno.ENOTSUP
        await device.flush()
        await device.close()


async def test_discard_shrinks_to_whole_blocks(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, block_min=4096) as server:
        device = await device_of(server)
        await device.discard(1, 12288)
        await device.discard(1, 4096)
        assert server.noted == [(consts.CMD_TRIM, 0, 4096, 8192)]
        await device.close()


async def test_extents_without_block_status_are_data(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        assert await device.extents(0, SIZE) == [Extent(SIZE, EXTENT_DATA)]
        await device.prefetch(0, 4096)
        assert server.commands() == [consts.CMD_CACHE]
        await device.close()


# ---- what is refused ----


@pytest.mark.parametrize(
    ("cleared", "added", "reason"),
    [
        (0, consts.FLAG_READ_ONLY, "the server exports it read-only"),
        (consts.FLAG_SEND_FLUSH, 0, "the server has no FLUSH"),
    ],
)
async def test_only_reading_from_what_cannot_be_written_durably(
    tmp_path: Path, cleared: int, added: int, reason: str
) -> None:
    async with StrictServer(tmp_path, flags=FLAGS_ALL & ~cleared | added) as server:
        with pytest.raises(ResolveError, match=reason):
            await device_of(server)
        device = await device_of(server, read_only=True)
        await device.flush()
        bio = bio_of(OP_DISCARD, 0, 512)
        device.submit(bio)
        assert bio.status == errno.EPERM
        await device.close()


async def test_empty_export_is_refused(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, 0) as server:
        with pytest.raises(ResolveError, match="is empty"):
            await device_of(server)


async def test_missing_server_is_refused(tmp_path: Path) -> None:
    uri = f"nbd+unix:///?socket={tmp_path}/none"
    with pytest.raises(ResolveError) as caught:
        await open_device(uri)
    assert str(caught.value) == f"{uri}: cannot connect: no such file or directory"
    with pytest.raises(ResolveError, match="cannot connect: connection refused"):
        await open_device("nbd://127.0.0.1:1/")


@pytest.mark.parametrize("host", ["a..b", "a" * 64])
async def test_host_that_cannot_be_one_is_refused(host: str) -> None:
    with pytest.raises(ResolveError, match="cannot resolve"):
        await open_device(f"nbd://{host}/", read_only=True)


@pytest.mark.parametrize(
    ("greeting", "reason"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not an NBD server"),
        (b"", "hung up before its greeting"),
        (b"NBDMAGICIHAVEOPT\0\3" + b"junk" * 10, "bad option reply magic"),
    ],
)
async def test_server_that_is_none_is_refused(
    tmp_path: Path, greeting: bytes, reason: str
) -> None:
    async with StrictServer(tmp_path) as server:
        server.greeting = greeting
        with pytest.raises(ResolveError, match=reason):
            await open_nbd(server.uri, read_only=True)


async def test_silent_server_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_connection, "HANDSHAKE_TIMEOUT_S", 0.05)
    async with StrictServer(tmp_path) as server:
        server.greeting, server.is_silent = b"", True
        with pytest.raises(ResolveError, match="no NBD handshake within"):
            await open_nbd(server.uri, read_only=True)


# ---- whether it could be opened again ----


async def test_a_server_that_lets_no_new_client_in_is_known_beforehand(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device.check_again()
        server.greeting = b"SSH-2.0-OpenSSH_9.2\r\n"
        with pytest.raises(ResolveError, match="not an NBD server"):
            await device.check_again()
        assert await device.read(0, 512) == server.disk[:512]
        await device.close()


@pytest.mark.parametrize("is_silent", [False, True])
async def test_a_server_that_serves_one_client_at_a_time_is_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, is_silent: bool
) -> None:
    """It hangs up on others, or lets them wait, and takes us when our connection is closed."""
    monkeypatch.setattr(nbd_connect, "CHECK_S_MAX", 0.05)
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.greeting, server.is_silent = b"", is_silent
        await device.check_again()
        await device.close()


async def test_a_server_with_another_disk_is_known_beforehand(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        device.size += 512
        with pytest.raises(ResolveError, match="is another disk now: its size"):
            await device.check_again()
        await device.close()


# ---- loss ----


@pytest.mark.parametrize("multi", [False, True])
async def test_lost_connection_ends_everything_with_eio(
    tmp_path: Path, multi: bool
) -> None:
    flags = FLAGS_ALL if multi else FLAGS_ALL ^ consts.FLAG_CAN_MULTI_CONN
    async with StrictServer(tmp_path, flags=flags, block_min=512) as server:
        device = await device_of(server)
        server.gate.clear()
        bios = [bio_of(OP_READ, nr * 512, 512) for nr in range(2 * IN_FLIGHT_MAX)]
        bios += [bio_of(OP_FLUSH, 0, 0) for _ in range(3)]
        bios += [bio_of(OP_WRITE, 5, 100), bio_of(OP_WRITE, 0, 512)]
        bios.append(bio_of(OP_WRITE, 0, SIZE))
        for bio in bios:
            device.submit(bio)
        server.hang_up_after = len(server.noted)
        server.gate.set()
        await until(lambda: all(bio.status != PENDING for bio in bios))
        assert {bio.status for bio in bios} <= {0, errno.EIO}
        late = bio_of(OP_READ, 0, 512)
        device.submit(late)
        assert late.status == errno.EIO
        assert device._in_flight == 0
        await device.close()


async def lost_device(server: StrictServer, *, read_only: bool) -> NbdDevice:
    """A device whose server has just hung up at a READ."""
    device = await device_of(server, read_only=read_only)
    server.hang_up_after = len(server.noted)
    with pytest.raises(DeviceError):
        await device.read(0, 512)
    return device


async def read_again(device: NbdDevice) -> bytes:
    async for _ in attempts():
        with contextlib.suppress(DeviceError):
            return bytes(await device.read(0, 4))
    raise AssertionError("never connected again")


async def test_read_only_device_connects_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    async with StrictServer(tmp_path) as server:
        server.disk[:4] = b"seed"
        device = await lost_device(server, read_only=True)
        assert await read_again(device) == b"seed"
        assert device.nr_connections == CONNECTIONS
        server.hang_up_after = len(server.noted)
        assert await read_again(device) == b"seed"  # and again
        await device.close()
    assert caplog.text.count("connected again") == 2


async def test_read_only_device_asks_until_the_server_is_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MAX", 0.002)
    async with StrictServer(tmp_path) as server:
        device = await lost_device(server, read_only=True)
        away = server.path.rename(tmp_path / "away")
        with pytest.raises(DeviceError):
            await device.read(0, 4)
        away.rename(server.path)
        assert await read_again(device) == bytes(4)
        await device.close()


async def test_attempt_to_connect_that_meets_a_bug_is_logged_and_not_the_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MAX", 0.002)

    def fail(*_: object) -> None:
        raise RuntimeError("a bug")

    async with StrictServer(tmp_path) as server:
        device = await lost_device(server, read_only=True)
        with monkeypatch.context() as broken:
            broken.setattr(nbd_module, "check_same", fail)
            await until(lambda: "a bug" in device.health.last_error)
        assert f"{device.name}: RuntimeError('a bug'); trying again" in caplog.text
        assert "Traceback" in caplog.text
        assert await read_again(device) == bytes(4)
        await device.close()


async def test_close_ends_the_attempts_to_connect_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    async with StrictServer(tmp_path) as server:
        device = await lost_device(server, read_only=True)
        await device.close()
        others = asyncio.all_tasks() - server._tasks - {asyncio.current_task()}
        assert not [task for task in others if "connect" in repr(task.get_coro())]


async def test_reply_that_makes_no_sense_ends_the_connection(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.errors[consts.CMD_READ] = 0
        server._carry_out = lambda *_: b"x" * 100  # type: ignore[method-assign]  # too much data
        await device.read(0, 10)
        with pytest.raises(DeviceError):
            await asyncio.gather(*(device.read(0, 10) for _ in range(4)))
        await device.close()


async def test_close_says_goodbye_on_each_connection(tmp_path: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device.read(0, 1)
        assert device.nr_connections == CONNECTIONS
        await device.close()
        await device.close()
        await until(lambda: server.nr_goodbyes == CONNECTIONS)
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= len(before)


def test_identity_of_a_uri(tmp_path: Path) -> None:
    first = identity(f"nbd+unix:///x?socket={tmp_path}/s")
    assert first == identity(f"NBD+UNIX:///x?socket={tmp_path}/./s")
    assert identity("nbd://") == "nbd://"


async def test_extents_of_part_of_a_block_are_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # From a server that breaks its own block size: to ask again would never end.
    async def in_pieces(*_: object) -> list[tuple[int, int]]:
        await asyncio.sleep(0)
        return [(512, EXTENT_ZERO)]

    async with StrictServer(tmp_path, block_min=4096) as server:
        device = await open_device(server.uri)
        monkeypatch.setattr(device, "_has_status", True)
        assert isinstance(device, NbdDevice)
        monkeypatch.setattr(device._block_status, "_ask", in_pieces)
        async with asyncio.timeout(PATIENCE_S):
            extents = await device.extents(1024, 4096)
        assert extents == [Extent(4096, EXTENT_DATA)]
        await device.close()


async def test_block_status_is_bounded_whatever_the_server_tells(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A server may send 2^20 descriptors for one request, and as many for the next.
    monkeypatch.setattr(nbd_module, "RANGE_MAX", 256 << 10)
    monkeypatch.setattr(block_status, "STATUS_RANGE_MIN", 4 << 10)
    monkeypatch.setattr(block_status, "EXTENTS_MAX", 100)
    monkeypatch.setattr(nbd_connection, "EXTENTS_MAX", 100)

    def every_other(at: int, length: int) -> list[tuple[int, int]]:
        return [(512, (at // 512 + nr) % 2 * 3) for nr in range(length // 512)]

    async with StrictServer(tmp_path, status=every_other) as server:
        device = await device_of(server)
        first = await device.extents(512, SIZE - 512)
        assert first == [(512, 3), (512, 0)] * 50
        await device.extents(51200 + 512, SIZE - 51200 - 512)
        asked = [length for _, _, _, length in server.noted]
        # Less the second time, and more again when all of an answer could be taken.
        assert asked == [256 << 10, 16 << 10, 32 << 10, 64 << 10]
        await device.close()


async def test_extents_end_where_the_server_stops_telling(tmp_path: Path) -> None:
    def first_page(at: int, length: int) -> list[tuple[int, int]]:
        if at >= 8192:
            server.errors[consts.CMD_BLOCK_STATUS] = consts.EIO
        return [(4096, 3)]

    async with StrictServer(tmp_path, status=first_page) as server:
        device = await device_of(server)
        assert await device.extents(0, SIZE) == [Extent(12288, 3)]
        # Where it tells nothing at all, all is data.
        assert await device.extents(12288, 4096) == [Extent(4096, EXTENT_DATA)]
        await device.close()


@pytest.mark.parametrize("flag", [0, consts.FLAG_ROTATIONAL])
async def test_source_is_as_rotational_as_its_server_says(
    tmp_path: Path, flag: int
) -> None:
    flags = FLAGS_ALL & ~consts.FLAG_ROTATIONAL | flag
    async with StrictServer(tmp_path, flags=flags) as server:
        device = await open_nbd(server.uri, read_only=True)
        assert device.is_rotational is bool(flag)
        await device.close()
