# SPDX-License-Identifier: Apache-2.0
"""Checklist 5.1: load, suspend, resume and remove, as far as no other file tests them.

The rows, and the tests that stand for each: docs/kernel-checklist.md.
"""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, PENDING
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.dm.mapped_device import State
from tests.support.dm import ProbeTarget, make, submit


async def test_5_1_live_table_runs_while_another_is_loaded() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    live = device.active
    below = opener.open["/a"]
    below.hold = True
    bio = submit(device, OP_WRITE, 0, b"data")
    await registry.load("x", "0 8 linear /b 0")
    assert (device.active, device.state) == (live, State.ACTIVE)
    assert sorted(opener.still_open) == ["/a", "/b"]
    assert bio.status == PENDING
    below.let_go()
    assert bio.status == 0
    assert submit(device, OP_WRITE, 8, b"more").status == 0
    assert bytes(below.data[8:12]) == b"more"


async def test_5_1_load_destroys_the_inactive_table_that_it_replaces() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096, c=4096)
    await registry.load("x", "0 8 probe /b /c")
    await registry.load("x", "0 8 zero")
    assert ProbeTarget.lives == ["ctr", "dtr"]
    assert opener.still_open == ["/a"]
    assert device.table(inactive=True) == [(0, 8, "zero", "")]


async def test_5_1_failed_load_keeps_the_inactive_table() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096, c=4096)
    await registry.load("x", "0 8 linear /b 0")
    with pytest.raises(ConstructorError, match="Invalid probe"):
        await registry.load("x", "0 8 probe /a /c fail")
    assert device.table() == [(0, 8, "linear", "/a 0")]
    assert device.table(inactive=True) == [(0, 8, "linear", "/b 0")]
    assert opener.open["/c"].closed
    await device.resume()
    assert device.table() == [(0, 8, "linear", "/b 0")]


@pytest.mark.parametrize("noflush", [False, True])
async def test_5_1_io_that_comes_while_suspended_is_answered_by_the_new_table(
    noflush: bool,
) -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    await device.suspend(noflush=noflush)
    order: list[int] = []
    bios = [submit(device, OP_WRITE, 0, bytes([65 + nr]) * 4) for nr in range(5)]
    for nr, bio in enumerate(bios):
        bio.on_end(lambda _, nr=nr: order.append(nr))  # type: ignore[misc]
    read = submit(device, OP_READ, 0, 4)
    await registry.load("x", "0 8 linear /b 0")
    assert {bio.status for bio in (*bios, read)} == {PENDING}
    await device.resume()
    assert {bio.status for bio in (*bios, read)} == {0}
    assert order == [0, 1, 2, 3, 4]
    assert bytes(opener.open["/b"].data[:4]) == b"EEEE"
    assert bytes(opener.open["/a"].data[:4]) == bytes(4)


async def test_5_1_resume_order_of_a_swap() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    ProbeTarget.lives.clear()
    await registry.load("x", "0 8 probe /a /b")
    assert ProbeTarget.lives == ["ctr"]
    await device.resume()
    assert ProbeTarget.lives == [
        *("ctr", "presuspend", "postsuspend"),
        *("preresume", "resume"),
        "dtr",
    ]


async def test_5_1_every_preresume_comes_before_every_resume() -> None:
    device, registry, _ = await make("0 8 zero", a=4096, b=4096, c=4096, d=4096)
    await registry.load("x", "0 8 probe /a /b\n8 8 probe /c /d")
    await device.resume()
    assert ProbeTarget.lives == [
        *("ctr", "ctr", "preresume", "preresume", "resume", "resume")
    ]


async def test_5_1_refused_preresume_gives_the_old_table_back() -> None:
    device, registry, opener = await make("0 8 linear /c 0", a=4096, b=4096, c=4096)
    await registry.load("x", "0 8 probe /a /b refuse")
    with pytest.raises(TableError) as caught:
        await device.resume()
    assert caught.value.errno == errnos.EBUSY
    assert not opener.open["/c"].closed
    assert device.inactive is not None
    assert device.table() == [(0, 8, "linear", "/c 0")]
    with pytest.raises(TableError, match="will not"):
        await device.resume()
    assert device.state is State.ACTIVE


async def test_5_1_remove_of_a_suspended_device_suspends_no_second_time() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    await device.suspend()
    await registry.load("x", "0 8 probe /a /b")
    ProbeTarget.lives.clear()
    await registry.remove("x")
    assert ProbeTarget.lives == ["dtr", "dtr"]


async def test_5_1_target_is_the_same_object_after_suspend_and_resume() -> None:
    device, _, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert device.active is not None
    (target,) = device.active.targets
    for noflush in (False, True):
        await device.suspend(noflush=noflush)
        await device.resume()
    assert device.active.targets == (target,)
    assert ProbeTarget.lives.count("ctr") == 1


async def test_5_1_suspend_that_waits_can_be_looked_at_and_loaded_over() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    opener.open["/a"].hold = True
    submit(device, OP_WRITE, 0, b"slow")
    suspend = asyncio.create_task(device.suspend())
    await asyncio.sleep(0)
    assert device.state is State.SUSPENDING
    assert await device.status() == [(0, 8, "linear", "")]
    assert device.table() == [(0, 8, "linear", "/a 0")]
    load = asyncio.create_task(registry.load("x", "0 8 linear /b 0"))
    await asyncio.sleep(0)
    opener.open["/a"].let_go()
    await asyncio.gather(suspend, load)
    assert device.table(inactive=True) == [(0, 8, "linear", "/b 0")]
