# SPDX-License-Identifier: Apache-2.0
"""The verb `uncache`: the server writes a cache back and removes it, as the command does, and can be told to stop."""

import asyncio
import errno as errnos
import logging
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import TableError
from nbdtarget.control import messages as m
from nbdtarget.control import uncache
from nbdtarget.control.calls import Calls
from nbdtarget.control.figures import Figures
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.listener import Listener
from tests.support.uncaching import NR_SECTORS, World


class Server(World):
    """The same, whose verbs are called as the control socket calls them."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        self.calls = Calls(self.verbs)
        self.verbs.monitor = Observer(self.registry, Listener(self.registry))

    async def ask(self, *, stop: bool = False) -> m.UncacheAnswer:
        answer = await self.calls.carry_out("uncache", m.Uncache("disk", stop))
        assert isinstance(answer, m.UncacheAnswer)
        return answer

    async def is_uncaching(self) -> bool:
        figures = await self.verbs.figures(Figures())
        return figures.devices[0].uncaching

    def hold_origin(self) -> None:
        """Nothing can be written back."""
        fault = self.opener.faults["origin"]
        fault.ops, fault.fail_at = frozenset({OP_WRITE}), 0

    async def under_way(self) -> "asyncio.Task[m.UncacheAnswer]":
        """Begin to uncache. Returns when the cleaner runs, which can write nothing back."""
        self.hold_origin()
        asking = asyncio.create_task(self.ask())
        while "cleaner" not in self.line:
            await sleep(0.01)
        return asking


async def cannot_happen() -> int:
    raise AssertionError("a hand-over has begun")


@pytest.fixture
async def server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> AsyncIterator[Server]:
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(uncache, "POLL_S", 0.01)
    made = Server(tmp_path)
    yield made
    await made.registry.close()


async def test_the_origin_alone_is_the_disk(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await server.create(nr_dirty=5)
    answer = await server.ask()
    assert answer.is_done
    assert answer.text.startswith(f"{server.directory}/origin alone is the disk")
    assert server.line == f"0 {NR_SECTORS} linear origin 0"
    assert (server.directory / "origin").read_bytes() == server.content
    assert not await server.is_uncaching()
    (line,) = [each for each in caplog.messages if "uncache" in each]
    # Some may have been written back already.
    assert re.fullmatch(r"/dev/mapper/disk: uncache: [0-5] blocks are to be .*", line)
    assert f"/dev/mapper/disk: {answer.text}" in caplog.messages


async def test_it_can_be_stopped_and_gone_on_with(server: Server) -> None:
    await server.create(nr_dirty=3)
    asking = await server.under_way()
    assert await server.is_uncaching()
    with pytest.raises(TableError, match="disk is being uncached") as caught:
        await server.ask()
    assert caught.value.errno == errnos.EBUSY
    server.verbs.hand_over = cannot_happen
    with pytest.raises(TableError, match=" is being carried out"):
        await server.verbs.upgrade(m.Upgrade())
    await server.ask(stop=True)
    answer = await asking
    assert not answer.is_done
    assert "3 dirty blocks are left" in answer.text
    assert not await server.is_uncaching()
    assert server.fields["dirty_blocks"] == 3
    server.opener.faults["origin"].clear()
    assert (await server.ask()).is_done
    assert (server.directory / "origin").read_bytes() == server.content


@pytest.mark.long
async def test_it_goes_on_when_the_one_who_has_asked_goes_away(server: Server) -> None:
    await server.create(nr_dirty=3)
    asking = await server.under_way()
    asking.cancel()
    await asyncio.wait([asking])
    assert await server.is_uncaching()
    server.opener.faults["origin"].clear()
    while "linear" not in server.line:
        await sleep(0.01)
    while await server.is_uncaching():
        await sleep(0.01)
    assert (server.directory / "origin").read_bytes() == server.content


@pytest.mark.parametrize(
    ("table", "errno", "reason"),
    [
        (f"0 {NR_SECTORS} linear origin 0", errnos.EINVAL, "is not a cache"),
        (None, errnos.EINVAL, "it has no table"),
        ("", errnos.ENXIO, "Device does not exist"),
    ],
    ids=["linear", "no table", "no device"],
)
async def test_it_refuses_what_the_command_refuses(
    server: Server,
    table: str | None,
    errno: int,
    reason: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if table != "":
        directory = str(server.directory)
        await server.registry.create("disk", table, directory=directory)
    with pytest.raises(TableError, match=reason) as caught:
        await server.ask()
    assert caught.value.errno == errno
    assert str(caught.value).startswith("uncache disk: ")
    refusal = str(caught.value).removeprefix("uncache disk: ")
    assert f"/dev/mapper/disk: uncache: {refusal}" in caplog.text


async def test_nothing_to_stop(server: Server) -> None:
    await server.create()
    with pytest.raises(TableError, match="disk is not being uncached") as caught:
        await server.ask(stop=True)
    assert caught.value.errno == errnos.ENOENT


async def test_a_server_that_ends_meanwhile_loses_nothing(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    await server.create(nr_dirty=3)
    asking = await server.under_way()
    server.opener.faults["origin"].clear()
    await server.registry.close()
    with pytest.raises(TableError, match="Device does not exist"):
        await asking
    # The client that has asked may have gone.
    assert "/dev/mapper/disk: uncache: Device does not exist" in caplog.messages
