# SPDX-License-Identifier: Apache-2.0
"""Messages and descriptors from one process to another."""

import errno as errnos
import os
import socket
from collections.abc import Iterator

import pytest

from nbdtarget.control.calls import errno_of
from nbdtarget.daemon.handover import channel
from nbdtarget.daemon.handover.channel import Channel, ChannelError
from nbdtarget.daemon.handover.messages import Failed, Go, Hello, Moved, Prepared
from tests.support.handover import moved

MOVED = moved()


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Channel(ours), theirs


@pytest.mark.parametrize("message", [Hello(1, "0.1"), MOVED, Prepared(), Go(0.25)])
async def test_messages_arrive_as_they_were(
    ends: tuple[Channel, socket.socket], message: Hello | Moved | Prepared | Go
) -> None:
    one, other = ends
    await Channel(other).send(message)
    assert await one.receive(1) == (message, [])


async def test_many_descriptors_arrive_in_their_order(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "FDS_AT_ONCE", 3)
    one, other = ends
    files = [os.memfd_create(f"file {nr}") for nr in range(10)]
    await Channel(other).send(MOVED, files)
    await Channel(other).send(Prepared())
    message, got = await one.receive(1)
    assert message == MOVED
    assert [os.fstat(fd).st_ino for fd in got] == [os.fstat(fd).st_ino for fd in files]
    assert not any(map(os.get_inheritable, got))
    assert await one.receive(1) == (Prepared(), [])
    for fd in files + got:
        os.close(fd)


async def test_failure_of_the_other_side_is_an_error_with_its_reason(
    ends: tuple[Channel, socket.socket],
) -> None:
    one, other = ends
    await Channel(other).send(Failed("no such disk"))
    with pytest.raises(ChannelError, match=r"^no such disk$") as raised:
        await one.receive(1)
    assert not raised.value.has_ended
    assert errno_of(raised.value) == errnos.ECANCELED


@pytest.mark.parametrize(
    ("sent", "reason", "has_ended"),
    [
        (b"", "the other process has ended", True),
        (b"\0\0\0\x08\0\0", "the other process has ended", True),
        (b"\0\0\0\x08\0\0\0\0half", "the other process has ended", True),
        (b"\xff\0\0\0\0\0\0\0", "the other process has ended", True),
        (b"\0\0\0\x01\0\0\0\0\x01", "what this version does not understand", False),
        (b"\0\0\0\x01\0\0\0\x01\x80x", "the other process has ended", True),
    ],
)
async def test_what_is_cut_off_or_is_no_message_is_an_error(
    ends: tuple[Channel, socket.socket], sent: bytes, reason: str, has_ended: bool
) -> None:
    one, other = ends
    other.sendall(sent)
    other.shutdown(socket.SHUT_WR)
    with pytest.raises(ChannelError, match=reason) as raised:
        await one.receive(1)
    assert raised.value.has_ended is has_ended


async def test_silence_and_a_closed_end_are_errors(
    ends: tuple[Channel, socket.socket],
) -> None:
    one, other = ends
    with pytest.raises(ChannelError, match=r"does not answer for 0\.01 s"):
        await one.receive(0.01)
    other.close()
    with pytest.raises(ChannelError, match="Broken pipe"):
        await one.send(MOVED)
    with pytest.raises(ChannelError, match="Broken pipe"):
        one.send_now(Go(0.1))
