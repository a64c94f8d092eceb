# SPDX-License-Identifier: Apache-2.0
"""One server process follows signals in order. How it starts: test_serve; how it ends: test_stop."""

import asyncio
import os
import signal

import pytest

from nbdtarget.daemon.daemon import Daemon
from nbdtarget.server.listener import Listener


async def test_reloads_wait_for_the_start_and_for_each_other() -> None:
    server = Daemon()
    server.catch_signals(sighup_reloads=True)
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, came.set)

    async def send_many() -> None:
        for _ in range(100):
            os.kill(os.getpid(), signal.SIGHUP)
        came.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        await came.wait()

    try:
        await send_many()
        assert not server.stop.is_set()
        begun: asyncio.Queue[None] = asyncio.Queue()
        gate = asyncio.Semaphore(0)

        async def reload() -> None:
            begun.put_nowait(None)
            await gate.acquire()
            raise ValueError("what reload did not expect")

        server.follow_reloads(reload)
        await begun.get()
        await send_many()
        gate.release()
        await begun.get()
        gate.release()
        await send_many()
        await begun.get()
        assert begun.empty()
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)
        server.release_signals()
        await server.close()


async def test_job_is_told_when_a_hand_over_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The devices were opened again, so what it had set on them is gone. Clients do not go on before it is set anew."""
    server = Daemon()
    told: list[str] = []
    server.reopened = lambda: told.append("the job")
    monkeypatch.setattr(Listener, "thaw", lambda _: told.append("clients"))
    assert await server.freeze(5) == []
    await server.thaw()
    assert told == ["the job", "clients"]
    await server.close()
