# SPDX-License-Identifier: Apache-2.0
"""Which epoll instance an event loop waits with."""

import asyncio
import os
import select
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import uvloop

from nbdtarget.server.loop_epoll import maybe_epoll_of


@pytest.mark.parametrize("new_loop", [asyncio.new_event_loop, uvloop.new_event_loop])
def test_the_one_of_a_loop_is_found(
    new_loop: Callable[[], asyncio.AbstractEventLoop],
) -> None:
    one, other = socket.socketpair()

    async def wait() -> int | None:
        loop = asyncio.get_running_loop()
        came = asyncio.Event()
        loop.add_reader(one, came.set)
        other.send(b"x")
        await came.wait()
        found = maybe_epoll_of(one.fileno())
        loop.remove_reader(one)
        return found

    decoy = select.epoll()  # watches something else
    decoy.register(other, select.EPOLLIN)
    with asyncio.Runner(loop_factory=new_loop) as runner:
        found = runner.run(wait())
        assert found is not None
        assert found != decoy.fileno()
        assert os.readlink(f"/proc/self/fd/{found}") == "anon_inode:[eventpoll]"
    decoy.close()
    one.close()
    other.close()


def test_what_nothing_watches_has_none(tmp_path: Path) -> None:
    with select.epoll():
        assert maybe_epoll_of(0) is None


def test_kernel_that_does_not_say_is_no_error(tmp_path: Path) -> None:
    assert maybe_epoll_of(0, tmp_path) is None
    (tmp_path / "fd").mkdir()
    (tmp_path / "fd/3").symlink_to("anon_inode:[eventpoll]")
    assert maybe_epoll_of(0, tmp_path) is None
    (tmp_path / "fdinfo").mkdir()
    (tmp_path / "fdinfo/3").write_text(
        "pos:\t0\ntfd:        7 events:       19\ntfd:        5 events: 19\n"
    )
    assert maybe_epoll_of(5, tmp_path) == 3
