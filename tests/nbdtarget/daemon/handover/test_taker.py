# SPDX-License-Identifier: Apache-2.0
"""The new process's side of a hand-over, against an old one that does what it is told."""

import asyncio
import os
import socket
from collections.abc import Iterator

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.daemon.handover.channel import Channel, ChannelError
from nbdtarget.daemon.handover.messages import (
    FORMAT,
    Go,
    Hello,
    Moved,
    Prepared,
)
from nbdtarget.daemon.handover.program import VARIABLE
from nbdtarget.daemon.handover.taker import Offer, maybe_offer
from tests.support.handover import moved

MOVED = moved()


@pytest.fixture
def ends() -> Iterator[tuple[Offer, Channel]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield Offer(Channel(ours)), Channel(theirs)


async def test_it_takes_what_is_sent_and_waits_for_go(
    ends: tuple[Offer, Channel],
) -> None:
    offer, old = ends
    taken = asyncio.create_task(offer.receive())
    await old.send(Hello(FORMAT, "0.0"))
    answer, _ = await old.receive(1)
    assert isinstance(answer, Hello)
    await old.send(MOVED)
    assert await taken == (MOVED, [])
    prepared = asyncio.create_task(offer.prepared())
    assert await old.receive(1) == (Prepared(), [])
    assert not prepared.done()
    await old.send(Go(0.1))
    await prepared


async def test_an_old_process_that_has_died_has_let_go(
    ends: tuple[Offer, Channel],
) -> None:
    offer, old = ends
    old.close()
    await offer.prepared()


@pytest.mark.parametrize("said", [Hello(FORMAT, "0"), MOVED])
async def test_without_go_it_does_not_go_on(
    ends: tuple[Offer, Channel], said: Hello | Moved
) -> None:
    offer, old = ends
    await old.send(said)
    with pytest.raises(ChannelError, match="does not say Go"):
        await offer.prepared()


async def test_another_format_is_refused_on_both_sides(
    ends: tuple[Offer, Channel],
) -> None:
    offer, old = ends
    await old.send(Hello(FORMAT + 1, "9.9"))
    with pytest.raises(ChannelError, match=r"^nbdtarget 9\.9 hands over in format 3"):
        await offer.receive()
    answer, _ = await old.receive(1)
    assert isinstance(answer, Hello)
    assert answer.format == FORMAT


async def test_messages_out_of_turn_are_refused(ends: tuple[Offer, Channel]) -> None:
    offer, old = ends
    await old.send(Prepared())
    with pytest.raises(ChannelError, match="does not begin with Hello"):
        await offer.receive()
    await old.send(Hello(FORMAT, "0"))
    await old.send(Go(1.0))
    with pytest.raises(ChannelError, match="sends no devices"):
        await offer.receive()


async def test_the_reason_of_a_failure_is_told(ends: tuple[Offer, Channel]) -> None:
    offer, old = ends
    await offer.fail(TableError("no such disk"))
    with pytest.raises(ChannelError, match=r"^no such disk$"):
        await old.receive(1)


def test_an_offer_is_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    assert maybe_offer() is None
    ours, theirs = socket.socketpair()
    with ours:
        fd = theirs.detach()
        os.set_inheritable(fd, True)
        monkeypatch.setenv(VARIABLE, str(fd))
        offer = maybe_offer()
        assert offer is not None
        assert maybe_offer() is None
        offer.close()
    monkeypatch.setenv(VARIABLE, "x")
    assert maybe_offer() is None
