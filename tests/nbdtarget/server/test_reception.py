# SPDX-License-Identifier: Apache-2.0
"""Receiving in transmission: on either event loop, beside other connections, and not more than a share of a turn."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import uvloop

from nbdtarget.server.input import Input
from nbdtarget.server.reception import Reception
from nbdtarget_protocol import consts as c
from tests.support.peer import MIB, Served


async def _converse(path: Path) -> None:
    served = Served(path)
    peer = await served.attach(structured=True)
    large = b"l" * 300_000
    for at in range(100):  # one at a time: the connection is alone and polls
        payload = bytes([at + 1]) * 4096
        assert (await peer.ask(c.CMD_WRITE, at * 4096, payload=payload)).error == 0
        assert (await peer.ask(c.CMD_READ, at * 4096, 4096)).data == payload
    assert (await peer.ask(c.CMD_WRITE, 0, payload=large)).error == 0
    assert (await peer.ask(c.CMD_READ, 0, len(large))).data == large
    served.disk.hold = True
    for _ in range(10):
        peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(10)
    peer.send(c.CMD_DISC)
    served.disk.let_go()
    for _ in range(10):
        assert (await peer.reply()).data == large[:4096]
    assert await peer.at_end()
    await served.close()


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_conversation_on_either_loop(run: type, tmp_path: Path) -> None:
    run(_converse(tmp_path))


async def test_polling_connection_lets_others_in(served: Served) -> None:
    served.limits = replace(served.limits, poll_us=500)
    busy, other = await served.attach(), await served.attach()

    async def ask_on() -> None:
        while True:
            await busy.ask(c.CMD_READ, 0, 512)

    asking = asyncio.create_task(ask_on())
    for _ in range(20):
        assert (await other.ask(c.CMD_READ, 0, 512)).error == 0
    asking.cancel()
    await asyncio.gather(asking, return_exceptions=True)


async def test_turn_receives_batches_max_times_and_goes_on_by_itself(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Receiving data without an answer, such as the payload of a refused WRITE, leaves other connections their turns."""
    monkeypatch.setattr("nbdtarget.server.reception.BATCHES_MAX", 4)
    served.limits = replace(served.limits, receive_buffer=20 << 10, own_payload_min=512)
    peer = await served.attach()
    turns = [0]
    usual, once = Reception.receive, Input.receive

    def turn(self: Reception, stop: int | None = None) -> None:
        turns.append(0)
        usual(self, stop)

    def receive(self: Input) -> int:
        nr = once(self)
        turns[-1] += 1
        return nr

    monkeypatch.setattr(Reception, "receive", turn)
    monkeypatch.setattr(Input, "receive", receive)
    refused = await peer.ask(c.CMD_WRITE, MIB, payload=bytes(4 << 20))
    assert refused.error == c.ENOSPC
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
    assert max(turns) == 4
