# SPDX-License-Identifier: Apache-2.0
"""NbdDevice and servers that go, hang, come back, or come back as something else."""

import asyncio
import errno
import logging
from collections.abc import Awaitable
from contextlib import suppress
from pathlib import Path

import pytest

from nbdtarget.bio import (
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
    Bio,
)
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.nbd import connection as nbd_connection
from nbdtarget.devices.nbd import device as nbd_module
from nbdtarget.devices.nbd.device import NbdDevice, open_nbd
from nbdtarget_protocol import consts
from tests.support.nbd_device import bio_of, device_of
from tests.support.nbd_server import FLAGS_ALL, StrictServer
from tests.support.patience import PATIENCE_S, until

SINGLE = FLAGS_ALL ^ consts.FLAG_CAN_MULTI_CONN


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the client connect again after milliseconds, because the servers here come back at once."""
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MAX", 0.004)


async def hung_up(server: StrictServer, device: NbdDevice) -> None:
    """The server hangs up at a READ."""
    server.hang_up_after = len(server.noted)
    with suppress(DeviceError):
        await device.read(0, 512)
    server.hang_up_after = -1


async def recovered(device: NbdDevice) -> None:
    await until(lambda: device.health.is_usable)


async def gives_eio(awaitable: Awaitable[object]) -> None:
    with pytest.raises(DeviceError) as caught:
        await awaitable
    assert caught.value.errno == errno.EIO


# ---- what a loss costs ----


async def test_written_device_connects_again_and_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device.write(0, b"durable")
        await device.flush()
        await hung_up(server, device)
        assert device.health.state is HealthState.LOST
        assert device.health.last_error == "connection lost: server hung up"
        await recovered(device)
        await device.write(512, b"more")
        await device.flush()
        assert device.losses == 0
        assert server.disk[:7] == b"durable"
        assert server.disk[512:516] == b"more"
        await device.close()
    assert "may be lost" not in caplog.text


async def test_a_server_that_is_shutting_down_is_left_and_its_successor_found(
    tmp_path: Path,
) -> None:
    """nbdkit stays, and refuses everything with ESHUTDOWN, while a client is connected."""
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device.write(0, b"durable")
        await device.flush()
        server.errors[consts.CMD_WRITE] = errno.ESHUTDOWN
        await gives_eio(device.write(0, b"refused"))
        assert device.health.state is HealthState.LOST
        # As the standard demands: with a goodbye.
        await until(lambda: server.nr_goodbyes == server.nr_connections)
        del server.errors[consts.CMD_WRITE]
        await recovered(device)
        await device.write(0, b"retried")
        await device.flush()
        assert device.losses == 0
        assert server.disk[:7] == b"retried"
        await device.close()


@pytest.mark.parametrize("op", [OP_WRITE, OP_WRITE_ZEROES])
async def test_writes_that_no_flush_covered_are_a_loss(
    tmp_path: Path, op: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await device._io(bio_of(op, 0, 512))
        await hung_up(server, device)
        assert device.losses == 1
        await recovered(device)
        await hung_up(server, device)  # nothing was written since
        await recovered(device)
        assert device.losses == 1
        await device.flush()  # who tells whom is for those who flush: `FlushObserver`
        await device.close()
    assert "the next FLUSH of each client fails" in caplog.text


async def test_write_that_ends_while_a_flush_runs_is_not_covered_by_it(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.gate.clear()
        flush = bio_of(OP_FLUSH, 0, 0)
        device.submit(flush)
        await until(lambda: server.commands() == [consts.CMD_FLUSH])
        # The server answers in any order that it likes: this write, then the flush.
        device._nr_written += 1
        server.gate.set()
        await until(lambda: flush.status == 0)
        await hung_up(server, device)
        assert device.losses == 1
        await device.close()


@pytest.mark.parametrize("flags", [FLAGS_ALL, FLAGS_ALL ^ consts.FLAG_SEND_FUA])
async def test_durable_writes_and_discards_are_no_loss(
    tmp_path: Path, flags: int
) -> None:
    async with StrictServer(tmp_path, flags=flags) as server:
        device = await device_of(server)
        await device.write(0, b"durable", fua=True)
        await device.discard(4096, 4096)
        await hung_up(server, device)
        assert device.losses == 0
        await device.close()


async def test_unanswered_requests_end_with_eio_and_are_not_sent_again(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.gate.clear()
        ops = (OP_READ, OP_WRITE, OP_FLUSH, OP_WRITE_ZEROES, OP_DISCARD)
        bios = [bio_of(op, 0, 512 if op != OP_FLUSH else 0) for op in ops]
        for bio in bios:
            device.submit(bio)
        await until(lambda: len(server.noted) >= device.nr_connections)
        server.hang_up_after = 0
        server.hang_up_all()
        await until(lambda: all(bio.status != PENDING for bio in bios))
        assert {bio.status for bio in bios} == {errno.EIO}
        server.hang_up_after = -1
        server.noted.clear()
        server.gate.set()
        await recovered(device)
        assert device.losses == 0
        assert server.noted == []
        assert device.health.errors == {
            "read": 1,
            "write": 1,
            "flush": 1,
            "write_zeroes": 1,
            "discard": 1,
        }
        await device.close()


async def test_latched_device_is_cured_by_a_new_connection_but_tells_of_it(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.errors[consts.CMD_FLUSH] = errno.EIO
        await gives_eio(device.flush())
        assert device.health.state is HealthState.LATCHED
        del server.errors[consts.CMD_FLUSH]
        await gives_eio(device.flush())
        await hung_up(server, device)
        await recovered(device)
        assert device.losses == 1
        await device.flush()
        await device.close()


async def test_what_comes_while_the_server_is_away_ends_at_once(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        away = server.path.rename(tmp_path / "away")
        await hung_up(server, device)
        for op in (OP_READ, OP_WRITE, OP_FLUSH):
            late = bio_of(op, 0, 512 if op != OP_FLUSH else 0)
            device.submit(late)
            assert late.status == errno.EIO
        await until(lambda: "cannot connect" in device.health.last_error)
        away.rename(server.path)
        await recovered(device)
        await device.close()


# ---- another disk ----


@pytest.mark.parametrize("read_only", [False, True])
@pytest.mark.parametrize(
    ("change", "what"),
    [
        ("size", "size is 1052672 bytes, not 1048576"),
        ("block", "minimum block size is 512 bytes, not 1"),
        ("payload", "maximum payload is 1048576 bytes, not 33554432"),
    ],
)
async def test_another_disk_is_refused_and_the_right_one_taken_later(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    read_only: bool,
    change: str,
    what: str,
) -> None:
    async with StrictServer(tmp_path) as server:
        server.disk[:4] = b"seed"
        device = await device_of(server, read_only=read_only)
        right = server.disk
        if change == "size":
            server.disk = right + bytes(4096)
        elif change == "block":
            server.block_min = 512
        else:
            server.payload_max = 1 << 20
        await hung_up(server, device)
        nr = server.nr_connections
        await until(lambda: server.nr_connections > nr + 10)  # it goes on looking
        assert f"is another disk now: its {what}" in device.health.last_error
        assert caplog.text.count("is another disk now") == 1
        await gives_eio(device.read(0, 512))
        server.disk, server.block_min, server.payload_max = right, 1, 32 << 20
        await recovered(device)
        assert bytes(await device.read(0, 4)) == b"seed"
        await device.close()


async def test_server_that_may_not_be_written_to_any_more(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.flags = FLAGS_ALL | consts.FLAG_READ_ONLY
        await hung_up(server, device)
        await until(lambda: "exports it read-only" in caplog.text)
        server.flags = FLAGS_ALL
        await recovered(device)
        await device.close()


async def test_server_that_can_less_than_before_is_taken(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        server.flags = consts.FLAG_HAS_FLAGS | consts.FLAG_SEND_FLUSH
        await hung_up(server, device)
        await recovered(device)
        server.noted.clear()
        await device.write(0, b"x" * 512, fua=True)
        await device.write_zeroes(0, 512)
        await device.discard(0, 512)
        await device.prefetch(0, 512)
        assert server.commands() == [
            consts.CMD_WRITE,
            consts.CMD_FLUSH,
            consts.CMD_WRITE,
        ]
        assert device.nr_connections == 1
        await device.close()


# ---- what an old connection still has under way ----


async def hanging_write(server: StrictServer, device: NbdDevice) -> Bio:
    server.gate.clear()
    old = bio_of(OP_WRITE, 0, 512)
    assert old.payload is not None
    old.payload[:] = b"o" * 512
    device.submit(old)
    await until(lambda: len(server.noted) == 1)
    return old


async def test_new_connection_waits_for_the_writes_of_the_old_one(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        old = await hanging_write(server, device)
        device._connection_lost("told so by the test")
        assert old.status == errno.EIO
        nr = server.nr_connections
        await asyncio.sleep(0.05)
        assert server.nr_connections == nr
        assert not device.health.is_usable
        server.gate.set()
        await recovered(device)
        assert server.disk[:512] == b"o" * 512  # it has landed, and never will again
        await device.write(0, b"n" * 512)
        assert server.disk[:512] == b"n" * 512
        await device.close()


async def test_new_connection_waits_for_a_server_that_hangs_up(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        device = await device_of(server)
        await hanging_write(server, device)
        device._connection_lost("told so by the test")
        await asyncio.sleep(0.02)
        assert server.nr_connections == 1
        server.hang_up_all()
        await recovered(device)
        server.gate.set()
        await device.write(0, b"n" * 512)
        assert server.disk[:512] == b"n" * 512
        await device.close()


async def test_so_does_a_device_that_is_opened_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nbd_connection, "END_TIMEOUT_S", 0.05)
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        await hanging_write(server, device)
        device._connection_lost("told so by the test")
        await device.close()
        with pytest.raises(ResolveError, match="may still be under way"):
            await open_nbd(server.uri, read_only=False)
        reader = await open_nbd(server.uri, read_only=True)  # it cannot be overtaken
        await reader.close()
        monkeypatch.setattr(nbd_connection, "END_TIMEOUT_S", PATIENCE_S)
        server.gate.set()
        device = await open_nbd(server.uri, read_only=False)
        assert server.disk[:512] == b"o" * 512
        await device.close()
    assert nbd_connection._given_up == []


async def test_late_reply_does_not_touch_the_buffer_of_a_read_that_was_given_up(
    tmp_path: Path,
) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        server.disk[:] = b"d" * len(server.disk)
        device = await device_of(server)
        await hanging_write(server, device)
        reads = [bio_of(OP_READ, 0, length) for length in (512, 100_000)]
        for bio in reads:
            device.submit(bio)
        device._connection_lost("told so by the test")
        assert [bio.status for bio in reads] == [errno.EIO] * 2
        server.gate.set()
        await recovered(device)
        assert not any(any(bio.payload or b"") for bio in reads)
        await device.close()


async def test_write_that_was_sent_in_part_is_not_waited_for(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        device = await device_of(server)
        server.gate.clear()
        device.submit(bio_of(OP_READ, 0, 512))
        await until(lambda: len(server.noted) == 1)
        for _ in range(16):  # more than the socket takes
            device.submit(bio_of(OP_WRITE, 0, 1 << 20))
        await asyncio.sleep(0.02)
        sent = sum(noted[0] == consts.CMD_WRITE for noted in server.noted)
        assert sent < 16
        device._connection_lost("told so by the test")
        server.gate.set()
        await recovered(device)
        await device.close()


# ---- time ----


async def timed(server: StrictServer, seconds: str = "") -> NbdDevice:
    uri = server.uri + (f"&request-timeout={seconds}" if seconds else "")
    return await open_nbd(uri, read_only=False)


def hurry(device: NbdDevice, read_s: float, write_s: float) -> None:
    """Make all of it faster than a URI can say."""
    for connection in device._connections:
        object.__setattr__(connection.uri, "read_timeout_s", read_s)
        object.__setattr__(connection.uri, "write_timeout_s", write_s)
        connection._tick_s = nbd_connection._tick_s(connection.uri)


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE, OP_FLUSH])
async def test_request_that_takes_too_long_makes_the_connection_lost(
    tmp_path: Path, op: int, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        device = await timed(server, "1")
        hurry(device, 0.04, 0.04)
        server.gate.clear()
        bio = bio_of(op, 0, 512 if op != OP_FLUSH else 0)
        device.submit(bio)
        await until(lambda: bio.status != PENDING)
        assert bio.status == errno.EIO
        assert "within 0.04 s" in caplog.text
        server.gate.set()
        await recovered(device)
        await device.close()


async def test_writes_have_all_the_time_in_the_world_by_default(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        device = await timed(server)
        assert device._connections[0].uri.read_timeout_s == 60
        hurry(device, 0.02, device._connections[0].uri.write_timeout_s)
        server.gate.clear()
        bio = bio_of(OP_WRITE, 0, 512)
        device.submit(bio)
        await asyncio.sleep(0.1)
        assert bio.status == PENDING
        server.gate.set()
        await until(lambda: bio.status == 0)
        await device.close()


async def test_slow_link_is_not_a_server_that_hangs(tmp_path: Path) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        device = await timed(server)
        hurry(device, 0.1, 0)
        for _ in range(4):
            bio = bio_of(OP_READ, 0, 512)
            device.submit(bio)
            connection = device._connections[0]
            for _ in range(3):
                await asyncio.sleep(0.01)
                connection._has_heard = True
            await until(lambda bio=bio: bio.status == 0)  # type: ignore[misc]  # bound now
        await device.close()


@pytest.mark.parametrize("text", ["", "x", "-1", "1.5", "86401"])
async def test_time_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ResolveError, match="request-timeout is 0 to 86400 seconds"):
        await open_nbd(
            f"nbd+unix:///?socket={tmp_path}/s&request-timeout={text}", read_only=True
        )


async def test_reads_are_given_up_on_request_and_nothing_else_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path, flags=SINGLE) as server:
        server.disk[:] = b"d" * len(server.disk)
        device = await device_of(server)
        write = await hanging_write(server, device)
        reads = [bio_of(OP_READ, 0, 512) for _ in range(2 * nbd_module.IN_FLIGHT_MAX)]
        for bio in reads:
            device.submit(bio)
        with caplog.at_level(logging.WARNING):
            device.give_up_reads()
        assert {bio.status for bio in reads} == {errno.EIO}
        assert "128 reads given up" in caplog.text
        assert write.status == PENDING
        again = bio_of(OP_READ, 512, 512)
        device.submit(again)
        server.gate.set()
        await until(lambda: again.status == 0)
        assert write.status == 0
        assert again.payload is not None
        assert bytes(again.payload) == b"d" * 512
        assert not any(any(bio.payload or b"") for bio in reads)
        device.give_up_reads()
        assert device._in_flight == 0
        await device.close()


async def test_source_whose_reads_are_given_up_fails_at_once_until_it_is_back(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server, read_only=True)
        device.give_up_reads()  # there are none: nothing happens
        assert device.health.is_usable
        server.gate.clear()
        read = bio_of(OP_READ, 0, 512)
        device.submit(read)
        device.give_up_reads()
        assert read.status == errno.EIO
        assert "connection lost: 1 reads given up" in caplog.text
        await gives_eio(device.read(0, 512))
        server.gate.set()
        await recovered(device)
        assert bytes(await device.read(0, 4)) == bytes(4)
        await device.close()


# ---- what a loss looks like in numbers ----


async def test_time_away_and_attempts_are_counted(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        traffic = device.traffic
        await device.read(0, 4096)
        assert (traffic.requests, traffic.bytes_received) == (1, 4096)
        assert (traffic.retries, traffic.away_s, traffic.away_since_s) == (0, 0, 0)
        await hung_up(server, device)
        assert traffic.away_since_s > 0
        assert traffic.bytes_received == 4096, "a read that failed has brought nothing"
        await recovered(device)
        assert traffic.retries >= 1
        assert traffic.away_since_s == 0
        assert traffic.away_s > 0
        await device.read(0, 512)
        assert traffic.bytes_received == 4096 + 512
        await device.close()
