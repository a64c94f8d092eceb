# SPDX-License-Identifier: Apache-2.0
"""The fuzzer of a whole server notices what it looks for."""

import asyncio
import random

import pytest

from nbdtarget.bio import Bio
from nbdtarget.server.tls import NO_TLS, ListenerTls, TlsOptions
from tests.support import wire_server
from tests.support.certificates import authority, needs_openssl
from tests.support.peer import Disk
from tests.support.wire_seeds import SEEDS
from tests.support.wire_server import fuzz_server, fuzz_server_with_tls


async def test_reply_that_does_not_come_is_late() -> None:
    with pytest.raises(AssertionError, match="late, in turns of the loop"):
        await wire_server._soon(asyncio.Event().wait())


async def test_reply_that_takes_much_work_is_late(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def work() -> int:
        return sum(range(1000))

    assert await wire_server._soon(work()) == 499500
    monkeypatch.setattr(wire_server, "LATE_CPU_S", 0.0)
    with pytest.raises(AssertionError, match="late, in CPU time"):
        await wire_server._soon(work())


def test_server_that_lets_another_client_wait_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def submit(disk: Disk, bio: Bio, nr_turns: int = 300) -> None:
        if nr_turns == 300:
            bio.own()
        soon = asyncio.get_running_loop().call_soon
        if nr_turns:
            soon(submit, disk, bio, nr_turns - 1)
        else:
            disk.carry_out(bio)

    monkeypatch.setattr(wire_server.LateDisk, "submit", submit)
    seed = SEEDS["server"]["ended by EOF, structured replies late"]
    with pytest.raises(AssertionError, match="late, in turns"):
        fuzz_server(random.Random(seed))


@needs_openssl
@pytest.mark.parametrize("outcome", ["require: plain", "on: ahead"])
def test_plain_text_that_is_served_is_noticed(
    outcome: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = {
        "require: plain": ListenerTls(TlsOptions("on", str(authority()[1]))),
        "on: ahead": NO_TLS,  # STARTTLS is refused, and what follows is served
    }
    monkeypatch.setattr(wire_server, "_listener_tls", lambda _: broken[outcome])
    with pytest.raises(AssertionError):
        fuzz_server_with_tls(random.Random(SEEDS["server, tls"][outcome]))
