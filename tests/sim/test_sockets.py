# SPDX-License-Identifier: Apache-2.0
"""SimSocket does what a socket may do, and watches like one."""

import asyncio
import contextlib
import random
import socket
from collections.abc import Iterator

import pytest

from tests.sim.loop import SimLoop
from tests.sim.sockets import SimNetwork, SimSocket


@pytest.fixture
def loop() -> Iterator[SimLoop]:
    loop = SimLoop(1)
    yield loop
    loop.close()


@pytest.fixture
def pair(loop: SimLoop) -> tuple[SimSocket, SimSocket]:
    return SimNetwork(loop, random.Random(1), capacity=100).pair()


def test_bytes_come_in_order_and_bounded(pair: tuple[SimSocket, SimSocket]) -> None:
    one, other = pair
    assert one.send(bytes(range(150))) == 100
    with pytest.raises(BlockingIOError):
        one.send(b"x")
    assert other.recv(30) == bytes(range(30))
    assert one.send(b"x") == 1
    buffers = [memoryview(bytearray(60)), memoryview(bytearray(60))]
    assert other.recvmsg_into(buffers)[0] == 71
    assert bytes(buffers[0]) + bytes(buffers[1][:11]) == bytes(range(30, 100)) + b"x"
    with pytest.raises(BlockingIOError):
        other.recv(1)


def test_close_is_the_end_after_what_was_sent(
    pair: tuple[SimSocket, SimSocket],
) -> None:
    one, other = pair
    one.send(b"last")
    one.close()
    assert other.recv(10) == b"last"
    assert other.recv(10) == b""
    with pytest.raises(BrokenPipeError):
        other.send(b"x")


def test_close_with_unread_data_resets(pair: tuple[SimSocket, SimSocket]) -> None:
    one, other = pair
    other.send(b"never read")
    one.close()
    with pytest.raises(ConnectionResetError):
        other.recv(1)


def test_shutdown_leaves_the_other_direction(
    pair: tuple[SimSocket, SimSocket],
) -> None:
    one, other = pair
    one.shutdown(socket.SHUT_WR)
    assert other.recv(1) == b""
    other.send(b"still")
    assert one.recv(10) == b"still"


def test_partial_sends_and_empty_wakeups_lose_nothing(loop: SimLoop) -> None:
    network = SimNetwork(loop, random.Random(2), partial=0.9, again=0.3, capacity=7)
    one, other = network.pair()
    data, got = random.Random(3).randbytes(500), bytearray()
    left = bytearray(data)

    def write() -> None:
        with contextlib.suppress(BlockingIOError):
            del left[: one.send(left)]
        if not left:
            loop.remove_writer(one)
            one.close()

    def read() -> None:
        try:
            piece = other.recv(100)
        except BlockingIOError:
            return
        got.extend(piece)
        if not piece:
            loop.remove_reader(other)
            loop.stop()

    loop.add_writer(one, write)
    loop.add_reader(other, read)
    loop.run_forever()
    assert bytes(got) == data


def test_number_is_free_after_close_and_must_not_be_watched(loop: SimLoop) -> None:
    network = SimNetwork(loop, random.Random(1))
    one, _ = network.pair()
    fd = one.fileno()
    loop.add_reader(fd, lambda: None)
    with pytest.raises(AssertionError, match="closed while it is read"):
        one.close()
    loop.remove_reader(fd)
    one._network.give_back_fd(fd)
    assert network.pair()[0].fileno() == fd


def test_listener_accepts_whoever_connects(loop: SimLoop) -> None:
    network = SimNetwork(loop, random.Random(1))
    with pytest.raises(ConnectionRefusedError):
        network.connect()
    listener = network.listener()
    listener.listen(4)
    accepted = asyncio.Event()
    loop.add_reader(listener, accepted.set)
    client = network.connect()
    loop.run_until_complete(accepted.wait())
    server, _ = listener.accept()
    client.send(b"hello")
    assert server.recv(10) == b"hello"
    with pytest.raises(BlockingIOError):
        listener.accept()


def test_reader_is_called_once_after_an_error(
    loop: SimLoop, pair: tuple[SimSocket, SimSocket]
) -> None:
    """uvloop behaves in this way: findings/uvloop-add-reader-is-silent-after-a-socket-error.sh."""
    one, other = pair
    other.send(b"never read")
    one.send(b"12345678")
    one.close()
    seen: list[bytes] = []
    loop.add_reader(other, lambda: seen.append(other.recv(2)))
    loop.run_until_complete(asyncio.sleep(1))
    assert seen == [b"12"]
    loop.add_reader(other, lambda: seen.append(other.recv(2)))
    loop.run_until_complete(asyncio.sleep(1))
    assert seen == [b"12", b"34"]
    loop.remove_reader(other)
