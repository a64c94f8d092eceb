# SPDX-License-Identifier: Apache-2.0
"""Reads and writes are recorded in order while a trace runs, with the compiled fast path and without it."""

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.dm import access_trace as module
from nbdtarget_protocol import consts as c
from tests.support.site import SIZE, Site, linear


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(tmp_path)
    await made.registry.create("d", linear(made, bytes(SIZE)))
    yield made
    await made.close()


async def tell(site: Site, *words: str) -> list[str]:
    text = await site.registry.get("d").message(0, words)
    return [] if text is None else text.splitlines()


async def test_requests_are_recorded_between_start_and_stop(site: Site) -> None:
    peer = await site.attach("d")
    route = site.registry.get("d").fast_path
    await peer.ask(c.CMD_READ, 0, 512)
    was_open = route.op_max
    await tell(site, "@trace_start")
    assert route.op_max < 0
    await peer.ask(c.CMD_READ, 4096, 8192)
    await peer.ask(c.CMD_WRITE, 0, payload=bytes(1024))
    await peer.ask(c.CMD_FLUSH)
    await peer.ask(c.CMD_TRIM, 0, 4096)
    await peer.ask(c.CMD_READ, 4096, 8192)
    await tell(site, "@trace_stop")
    assert route.op_max == was_open >= 0
    await peer.ask(c.CMD_READ, 0, 512)
    expected = ["R,4096,8192", "W,0,1024", "R,4096,8192"]
    assert await tell(site, "@trace_print") == expected
    assert await tell(site, "@trace_print", "1") == expected[1:]
    assert await tell(site, "@trace_print", "1", "1") == expected[1:2]
    assert await tell(site, "@trace_print", "9") == []
    await tell(site, "@trace_clear")
    assert await tell(site, "@trace_print") == []


async def test_recording_ends_by_itself_and_statistics_go_on(site: Site) -> None:
    peer = await site.attach("d")
    path = site.registry.get("d").fast_path
    await tell(site, "@stats_create", "-", "/1")
    await tell(site, "@trace_start", "2")
    for nr in range(4):
        await peer.ask(c.CMD_READ, nr * 512, 512)
    assert await tell(site, "@trace_print") == ["R,0,512", "R,512,512"]
    assert path.op_max < 0
    assert (await tell(site, "@stats_print", "0"))[0].split()[1] == "4"
    await tell(site, "@stats_delete", "0")
    assert path.op_max >= 0


async def test_a_new_table_goes_on_recording(site: Site) -> None:
    peer = await site.attach("d")
    await tell(site, "@trace_start")
    await site.registry.load("d", f"0 {SIZE // 512} zero")
    await site.registry.resume("d")
    await peer.ask(c.CMD_READ, 512, 512)
    assert await tell(site, "@trace_print") == ["R,512,512"]


@pytest.mark.parametrize(
    "words",
    [
        ("@trace_start", "0"),
        ("@trace_start", str(module.ACCESSES_MAX + 1)),
        ("@trace_start", "x"),
        ("@trace_start", "1", "2"),
        ("@trace_print", "-1"),
        ("@trace_nonsense",),
    ],
    ids=" ".join,
)
async def test_what_is_no_such_message_is_refused(
    site: Site, words: tuple[str, ...]
) -> None:
    with pytest.raises(TableError, match="Invalid"):
        await tell(site, *words)
    assert site.registry.get("d").fast_path.op_max >= 0
