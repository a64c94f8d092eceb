# SPDX-License-Identifier: Apache-2.0
"""Connections that are lent to bulk copies: what goes over them, and how they come back or are lost."""

import asyncio
import errno
import random
import socket
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices import bulk
from nbdtarget.devices.bulk import BulkCopies
from nbdtarget.devices.bulk_streams import BulkFailure, Chunk, StreamLostError
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.nbd import device as nbd_module
from nbdtarget.devices.nbd import lent as lent_module
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.devices.nbd.lent import LentConnection
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget.devices.resolve import open_device
from nbdtarget.fast.compiled import IS_COMPILED, describe
from nbdtarget_protocol import consts
from nbdtarget_protocol.client import ClientNegotiated, ClientTransmission
from tests.support.bulk import MemoryFileDisk, WritableDisk
from tests.support.nbd_device import SIZE, device_of
from tests.support.nbd_server import FLAGS_ALL, StrictServer
from tests.support.patience import PATIENCE_S, until

CHUNK = 4096
CONTENT = random.Random(8).randbytes(SIZE)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 0.001)
    monkeypatch.setattr(bulk, "CHUNK_BYTES", CHUNK)
    monkeypatch.setattr(lent_module, "CHUNK_BYTES", CHUNK)


# ---- one connection, by hand ----


class Hand:
    """The server's end of a lent connection, without a loop; `said` is what the server says."""

    def __init__(
        self, *, is_structured: bool = True, timeout_s: float = PATIENCE_S
    ) -> None:
        ours, self.server = socket.socketpair()
        seconds, rest = int(timeout_s), int(timeout_s % 1 * 1_000_000)
        timeval = seconds.to_bytes(8, "little") + rest.to_bytes(8, "little")
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval)
        self.ours = ours
        negotiated = ClientNegotiated(
            "", SIZE, FLAGS_ALL, is_structured, (), 1, 4096, 1 << 25
        )
        connection = type("C", (), {"uri": NbdUri("", read_timeout_s=timeout_s)})()
        self.stream = LentConnection(
            None,  # type: ignore[arg-type]
            connection,
            ours,
            ClientTransmission(negotiated),
            512,
        )

    def ask(self, *lengths: int) -> list[Chunk]:
        chunks = []
        for length in lengths:
            chunk = Chunk(None, 0, length)  # type: ignore[arg-type]
            chunk.buffer = memoryview(bytearray(b"?" * length))
            chunks.append(chunk)
        self.stream.start(chunks)
        return chunks

    def say(self, *pieces: bytes) -> None:
        self.server.sendall(b"".join(pieces))

    def say_each(self, pieces: list[bytes]) -> None:
        for piece in pieces:
            self.say(piece)

    def close(self) -> None:
        self.ours.close()
        self.server.close()


def chunk_of(kind: int, cookie: int, payload: bytes, *, done: bool = False) -> bytes:
    flags = consts.REPLY_FLAG_DONE if done else 0
    magic = consts.STRUCTURED_REPLY_MAGIC
    return consts.CHUNK.pack(magic, flags, kind, cookie, len(payload)) + payload


def data_of(cookie: int, at: int, data: bytes, *, done: bool = False) -> bytes:
    payload = at.to_bytes(8, "big") + data
    return chunk_of(consts.REPLY_TYPE_OFFSET_DATA, cookie, payload, done=done)


def hole_of(cookie: int, at: int, length: int, *, done: bool = False) -> bytes:
    payload = at.to_bytes(8, "big") + length.to_bytes(4, "big")
    return chunk_of(consts.REPLY_TYPE_OFFSET_HOLE, cookie, payload, done=done)


@pytest.mark.parametrize("cut", [1, 37, 4096, 1 << 20])
def test_structured_replies_in_pieces_with_holes_and_out_of_order(cut: int) -> None:
    hand = Hand()
    first, second = hand.ask(40_000, 64_000)
    said = b"".join(
        (
            data_of(2, 32_000, CONTENT[:32_000]),
            hole_of(1, 0, 20_000),
            hole_of(2, 0, 32_000, done=True),
            data_of(1, 20_000, CONTENT[:20_000], done=True),
        )
    )
    pieces = [said[at : at + cut] for at in range(0, len(said), cut)]
    # One byte at a time would take long: a few, and then the rest.
    pieces[300:] = [b"".join(pieces[300:])]
    talking = threading.Thread(target=hand.say_each, args=(pieces,))
    talking.start()
    came: list[Chunk] = []
    while len(came) < 2:
        came += hand.stream.wait()
    talking.join()
    assert came == [second, first]
    assert [each.status for each in came] == [0, 0]
    assert second.buffer == bytes(32_000) + CONTENT[:32_000]
    assert first.buffer == bytes(20_000) + CONTENT[:20_000]
    assert hand.stream.nr_in_flight == 0
    hand.close()


def test_an_error_chunk_is_the_status_of_its_chunk_alone() -> None:
    hand = Hand()
    first, second = hand.ask(4096, 4096)
    error = consts.EIO.to_bytes(4, "big") + (3).to_bytes(2, "big") + b"bad"
    hand.say(
        data_of(1, 0, bytes(1000)),
        chunk_of(consts.REPLY_TYPE_ERROR, 1, error, done=True),
        data_of(2, 0, CONTENT[:4096], done=True),
    )
    came: list[Chunk] = []
    while len(came) < 2:
        came += hand.stream.wait()
    assert came == [first, second]
    assert (first.status, second.status) == (errno.EIO, 0)
    hand.close()


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (b"", "server hung up"),
        (b"garbage, and no reply at all", "bad reply magic"),
        (data_of(1, 0, CONTENT[:2000]), "server hung up"),
        (data_of(1, 0, CONTENT[:2000], done=True), "only 2000 bytes"),
        (data_of(1, 0, CONTENT[:20_000])[:30_000], "server hung up"),
        (data_of(7, 0, CONTENT[:2000], done=True), "unknown cookie"),
        (data_of(1, 39_000, CONTENT[:2000], done=True), "outside"),
    ],
)
def test_a_server_that_leaves_or_lies_breaks_the_stream(
    said: bytes, reason: str
) -> None:
    hand = Hand()
    hand.ask(40_000)
    hand.say(said)
    hand.server.shutdown(socket.SHUT_WR)
    with pytest.raises(StreamLostError, match=reason):
        hand.stream.wait()
    hand.close()


def test_a_server_that_is_silent_breaks_the_stream() -> None:
    hand = Hand(timeout_s=0.02)
    hand.ask(40_000)
    hand.say(data_of(1, 0, CONTENT[:20_000])[:18_000])
    with pytest.raises(StreamLostError, match=r"no answer to READ within 0\.02 s"):
        hand.stream.wait()
    hand.close()


def test_a_stream_that_is_shut_wakes_its_thread_and_takes_nothing_more() -> None:
    hand = Hand()
    hand.ask(4096)
    reasons: list[str] = []

    def wait() -> None:
        with pytest.raises(StreamLostError) as caught:
            hand.stream.wait()
        reasons.append(str(caught.value))

    thread = threading.Thread(target=wait)
    thread.start()
    hand.stream.shut()
    thread.join(PATIENCE_S)
    assert reasons == ["server hung up"]
    with pytest.raises(StreamLostError, match="broken pipe"):
        hand.ask(4096)
    hand.close()
    hand.stream.shut()  # also later


@pytest.mark.parametrize(
    ("sentence", "error", "reason"),
    [
        ("", -1, "server hung up"),
        ("", errno.EAGAIN, f"no answer to READ within {PATIENCE_S:g} s"),
        ("", errno.EPIPE, "broken pipe"),
        ("bad reply magic 0x1", 0, "bad reply magic 0x1"),
    ],
)
def test_what_compiled_code_tells_is_said_in_the_same_words(
    sentence: str, error: int, reason: str
) -> None:
    hand = Hand()
    assert hand.stream.lost_reason(sentence, error) == reason
    hand.close()


# ---- of a device ----


def test_a_server_of_this_machine_is_near() -> None:
    hand = Hand()
    stream = hand.stream
    assert stream.is_near  # a unix socket
    listening = socket.create_server(("127.0.0.1", 0))
    client = socket.create_connection(listening.getsockname())
    stream._sock = client
    assert stream.is_near

    class Far:
        """Stands for a connection to another machine."""

        family = socket.AF_INET

        def getsockname(self) -> tuple[str, int]:
            return "192.0.2.1", 40000

        def getpeername(self) -> tuple[str, int]:
            return "192.0.2.9", 10809

    stream._sock = Far()  # type: ignore[assignment]
    assert not stream.is_near
    listening.close()
    client.close()
    stream._sock = client  # which is closed
    assert not stream.is_near
    hand.close()


async def copied(copies: BulkCopies, offset: int, length: int) -> BulkFailure | None:
    copying = copies.maybe_copy(offset, length)
    assert copying is not None
    return await asyncio.wait_for(copying, PATIENCE_S)


@pytest.fixture(
    params=[
        "python",
        pytest.param(
            "compiled",
            marks=pytest.mark.skipif(not IS_COMPILED, reason=describe()),
        ),
    ]
)
async def destination(
    request: pytest.FixtureRequest,
) -> AsyncIterator[WritableDisk]:
    """A disk that decides by which code the threads copy."""
    is_python = request.param == "python"
    disk = WritableDisk(SIZE) if is_python else MemoryFileDisk(SIZE)
    yield disk
    await disk.close()


async def lending(
    server: StrictServer, destination: WritableDisk
) -> tuple[NbdDevice, BulkCopies]:
    server.disk[:] = CONTENT
    device = await device_of(server, read_only=True)
    return device, BulkCopies(device, destination)


async def test_all_connections_but_one_are_lent_and_come_back(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        for _ in range(2):
            assert await copied(copies, 0, SIZE) is None
            assert destination.content() == CONTENT
            assert (copies.nr_streams, device.nr_connections) == (3, 4)
            assert bytes(await device.read(0, 512)) == CONTENT[:512]
            copies.rest()
            await until(lambda: not device._lent)
        # By bios again, over all of them.
        reads = [device.read(at, 512) for at in range(0, 8 * 512, 512)]
        assert b"".join(await asyncio.gather(*reads)) == CONTENT[: 8 * 512]
        assert server.nr_connections == 4
        assert device.nr_connections == 4
        await device.close()
        await until(lambda: server.nr_goodbyes == 4)


async def test_what_is_in_flight_is_told_and_clients_read_meanwhile(
    tmp_path: Path,
    destination: WritableDisk,
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        server.gate.clear()
        copying = copies.maybe_copy(0, 64 * CHUNK)
        assert copying is not None
        await until(lambda: device.nr_in_flight == 3 * bulk.CHUNKS_PER_STREAM)
        reading = asyncio.ensure_future(device.read(512, 512))
        await until(lambda: (consts.CMD_READ, 0, 512, 512) in server.noted)
        server.gate.set()
        assert bytes(await reading) == CONTENT[512:1024]
        assert await copying is None
        copies.rest()
        await device.close()  # waits for the threads
        assert device._nr_borrowed == 0
        assert destination.content()[: 64 * CHUNK] == CONTENT[: 64 * CHUNK]


async def test_connections_that_are_in_use_are_not_lent(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        server.gate.clear()
        reads = [asyncio.ensure_future(device.read(0, 512)) for _ in range(4)]
        await until(lambda: len(server.noted) == 4)
        assert copies.maybe_copy(0, SIZE) is None
        server.gate.set()
        await asyncio.gather(*reads)
        assert await copied(copies, 0, SIZE) is None
        copies.rest()
        await device.close()


@pytest.mark.parametrize(
    "make",
    [
        lambda path: StrictServer(path, flags=FLAGS_ALL ^ consts.FLAG_CAN_MULTI_CONN),
        lambda path: StrictServer(path, payload_max=CHUNK // 2),
    ],
    ids=["one connection", "small requests"],
)
async def test_servers_of_which_nothing_is_lent(
    tmp_path: Path, destination: WritableDisk, make: Callable[[Path], StrictServer]
) -> None:
    async with make(tmp_path) as server:
        device, copies = await lending(server, destination)
        assert copies.maybe_copy(0, SIZE) is None
        await device.close()


async def test_a_device_that_is_written_lends_nothing(tmp_path: Path) -> None:
    async with StrictServer(tmp_path) as server:
        device = await device_of(server)
        assert device.lend_streams() == []
        await device.close()


async def test_parts_of_blocks_go_by_bios(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path, block_min=4096) as server:
        device, copies = await lending(server, destination)
        assert copies.maybe_copy(512, 4096) is None
        assert await copied(copies, 4096, 8192) is None
        copies.rest()
        await device.close()


@pytest.mark.parametrize("nr", [1, 2, 7])
async def test_the_uri_bounds_the_connections(tmp_path: Path, nr: int) -> None:
    async with StrictServer(tmp_path) as server:
        device = await open_device(f"{server.uri}&connections={nr}", read_only=True)
        assert isinstance(device, NbdDevice)
        assert device.nr_connections == server.nr_connections == nr
        lent = device.lend_streams()
        assert len(lent) == nr - 1
        for stream in lent:
            stream.give_back("")
        await device.close()


# ---- loss ----


async def test_a_copy_goes_on_when_the_server_is_back(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        server.hang_up_after = 9
        failure = await copied(copies, 0, SIZE)
        assert failure is not None
        assert (failure.status, failure.is_read) == (errno.EIO, True)
        server.hang_up_after = -1
        # Threads that were idle then are not asked any more.
        await until(lambda: device.health.is_usable)
        assert await copied(copies, 0, SIZE) is None
        assert destination.content() == CONTENT
        assert device.nr_connections == 4
        copies.rest()
        await device.close()


async def test_a_device_that_is_lost_takes_its_streams_back(
    tmp_path: Path, destination: WritableDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another connection has broken: the threads that wait for answers must end."""
    monkeypatch.setattr(nbd_module, "RECONNECT_S_MIN", 60.0)  # it stays lost
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        server.gate.clear()
        copying = copies.maybe_copy(0, SIZE)
        assert copying is not None
        await until(lambda: device.nr_in_flight == 3 * bulk.CHUNKS_PER_STREAM)
        device._connection_lost("the cable was cut")
        failure = await asyncio.wait_for(copying, PATIENCE_S)
        assert failure is not None
        assert failure.status == errno.EIO
        assert copies.maybe_copy(0, CHUNK) is None
        assert device.health.last_error == "connection lost: the cable was cut"
        server.gate.set()
        await device.close()
        assert device._nr_borrowed == 0


async def test_reads_that_hang_are_given_up(
    tmp_path: Path, destination: WritableDisk
) -> None:
    """The server is to stop, and the source does not answer."""
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        server.gate.clear()
        copying = copies.maybe_copy(0, SIZE)
        assert copying is not None
        await until(lambda: device.nr_in_flight == 3 * bulk.CHUNKS_PER_STREAM)
        device.give_up_reads()
        failure = await asyncio.wait_for(copying, PATIENCE_S)
        assert failure is not None
        assert failure.status == errno.EIO
        await device.close()
        assert device._nr_borrowed == 0


async def test_errors_are_noted_and_a_shutdown_is_a_loss(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        nr_connections = server.nr_connections
        server.errors[consts.CMD_READ] = errno.ENOMEM
        failure = await copied(copies, 0, SIZE)
        assert failure is not None
        assert failure.status == errno.ENOMEM
        assert device.health.state is HealthState.OK
        assert device.health.last_error == "read: Cannot allocate memory"
        server.errors[consts.CMD_READ] = errno.ESHUTDOWN
        failure = await copied(copies, 0, SIZE)
        assert failure is not None
        assert failure.status == errno.EIO
        await until(lambda: server.nr_goodbyes >= nr_connections)
        with pytest.raises(DeviceError):
            await device.read(0, 512)
        copies.rest()
        await device.close()


async def test_what_threads_have_read_is_counted(
    tmp_path: Path, destination: WritableDisk
) -> None:
    async with StrictServer(tmp_path) as server:
        device, copies = await lending(server, destination)
        before = device.traffic.requests
        assert await copied(copies, 0, 4 * CHUNK) is None
        assert device.traffic.bytes_received == 4 * CHUNK
        assert device.traffic.requests == before + 4
        await device.read(0, 512)
        assert device.traffic.bytes_received == 4 * CHUNK + 512
        assert device.traffic.requests == before + 5
        copies.rest()
        await device.close()
