# SPDX-License-Identifier: Apache-2.0
"""The loop is asked for an event once, however often that is asked for, and never after the end."""

import asyncio
import socket
from collections.abc import Iterator

import pytest

from nbdtarget.server.watch import Watch


@pytest.fixture
def sock() -> Iterator[socket.socket]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.sendall(b"something to receive")
        yield ours


async def turns(called: list[str]) -> list[str]:
    """Return the callbacks that are called in two turns of the loop."""
    called.clear()
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    return sorted(set(called))


async def test_each_event_is_asked_for_and_given_up_by_itself(
    sock: socket.socket,
) -> None:
    watch, called = Watch(asyncio.get_running_loop(), sock.fileno()), list[str]()
    watch.read(lambda: called.append("read"))
    watch.write(lambda: called.append("write"))
    assert await turns(called) == ["read", "write"]
    watch.stop_writing()
    assert (watch.is_reading, watch.is_writing) == (True, False)
    assert await turns(called) == ["read"]
    watch.write(lambda: called.append("write"))
    watch.stop_reading()
    assert await turns(called) == ["write"]
    watch.stop()
    watch.stop()
    assert await turns(called) == []


async def test_second_writer_does_not_replace_the_first(sock: socket.socket) -> None:
    watch, called = Watch(asyncio.get_running_loop(), sock.fileno()), list[str]()
    watch.write(lambda: called.append("first"))
    watch.write(lambda: called.append("second"))
    assert await turns(called) == ["first"]
    watch.stop()
