# SPDX-License-Identifier: Apache-2.0
"""delay: how long each class waits, where it goes, and that a suspend waits for none of it."""

import pytest

from nbdtarget.bio import (
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ConstructorError
from tests.support.clock import settle
from tests.support.tables import Disks, content, submit


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/a 0", "Requires exactly 3, 6 or 9 arguments"),
        ("/a 0 1 /b 0", "Requires exactly 3, 6 or 9 arguments"),
        ("/a x 1", "Invalid device sector"),
        ("/a 0 1s", "Invalid delay"),
        ("/a 0 4294967296", "Invalid delay"),
        ("/a 0 +1", "Invalid delay"),
        ("/no 0 1", "Device lookup failed: /no: No such file"),
        ("/a 9 1 /b x 1", "Invalid device sector"),
        ("/a 9 1 /no 0 1", "Device lookup failed: /no: No such file"),
        ("/a 0 1 /b 0 1 /b 9 1", "/b too small for target: start=9, len=8,"),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    disks = Disks(a=8192, b=8192)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 8 delay {words}")
    assert str(caught.value).startswith(f"delay: {reason}")
    # The refused table has closed its devices, so they can be used again.
    await disks.create("0 16 linear /a 0\n16 16 linear /b 0")


@pytest.mark.parametrize(
    "words", ["/a 0 20", "/a 1 0 /b 2 30", "/a 0 1 /b 0 2 /a 3 4294967295"]
)
async def test_table_can_be_loaded_again_as_it_is(words: str) -> None:
    disks = Disks(a=8192, b=8192)
    device = await disks.create(f"0 8 delay {words}")
    assert device.table() == [(0, 8, "delay", words)]
    assert await device.status() == [(0, 8, "delay", "0 0 0")]
    await disks.registry.close()
    assert disks["/a"].nr_closed == 1


async def test_each_class_has_its_device_offset_and_delay() -> None:
    disks = Disks(a=65536, b=65536, c=65536)
    device = await disks.create("0 8 zero\n8 8 delay /a 1 10 /b 2 20 /c 3 30")
    disks.log.clear()
    for op in (OP_FLUSH, OP_WRITE_ZEROES, OP_READ, OP_DISCARD, OP_CACHE):
        at = 0 if op == OP_FLUSH else 4096 + 512
        submit(device, op, at, 0 if op == OP_FLUSH else 512)
    submit(device, OP_WRITE, 4096, b"x" * 512)
    assert (await device.status())[1][3] == "2 3 1"
    disks.clock.advance(0.009)
    assert disks.log == []
    disks.clock.advance(0.001)
    assert disks.log == [("/a", "read", 1024, 512), ("/a", "cache", 1024, 512)]
    assert (await device.status())[1][3] == "0 3 1"
    disks.log.clear()
    disks.clock.advance(0.010)
    assert disks.log == [
        ("/b", "write_zeroes", 1536, 512),
        ("/b", "discard", 1536, 512),
        ("/b", "write", 1024, 512),
    ]
    assert (await disks.image("/b"))[1024:1536] == b"x" * 512
    disks.log.clear()
    disks.clock.advance(0.010)
    assert disks.log == [("/c", "flush", 0, 0)]
    assert (await device.status())[1][3] == "0 0 0"


async def test_three_words_are_for_all_and_six_share_the_second_set() -> None:
    disks = Disks(a=8192, b=8192, c=8192)
    await disks.create("0 8 delay /a 0 7")
    await disks.create("0 8 delay /c 0 0 /b 0 7", "e")
    disks.log.clear()
    for name in ("d", "e"):
        for op in (OP_READ, OP_FLUSH):
            submit(disks.registry.get(name), op, 0, 512 * (op == OP_READ))
    assert disks.log == [("/c", "read", 0, 512)]
    disks.log.clear()
    disks.clock.advance(0.007)
    assert disks.log == [
        ("/a", "read", 0, 512),
        ("/a", "flush", 0, 0),
        ("/b", "flush", 0, 0),
    ]


async def test_equal_delays_keep_their_order_and_shorter_ones_overtake() -> None:
    disks = Disks(a=65536)
    device = await disks.create("0 8 delay /a 0 5 /a 0 50")
    disks.log.clear()
    for at in (3, 1, 2):
        submit(device, OP_WRITE, at * 512, b"x" * 512)
        disks.clock.advance(0.0001)
    submit(device, OP_READ, 0, 512)
    disks.clock.advance(0.0497)
    assert disks.log == [("/a", "read", 0, 512), ("/a", "write", 1536, 512)]
    disks.clock.advance(0.002)
    assert [entry[2] for entry in disks.log[2:]] == [512, 1024]


async def test_a_bio_that_comes_from_an_end_does_not_make_the_next_one_late() -> None:
    disks = Disks(a=65536)
    device = await disks.create("0 8 delay /a 0 10 /a 0 1000")
    disks.log.clear()

    def again(_: Bio) -> None:
        submit(device, OP_WRITE, 0, b"y")

    submit(device, OP_READ, 0, 1, endio=again)
    disks.clock.advance(0.005)
    submit(device, OP_READ, 512, 1)
    disks.clock.advance(0.010)
    assert [entry[1:3] for entry in disks.log] == [("read", 0), ("read", 512)]


async def test_suspend_sends_everything_at_once_and_resume_delays_again() -> None:
    disks = Disks(a=8192)
    device = await disks.create("0 8 delay /a 0 100000")
    first = submit(device, OP_WRITE, 0, b"x" * 512)
    flush = submit(device, OP_FLUSH)
    assert first.status < 0
    await device.suspend()
    assert (first.status, flush.status) == (0, 0)
    queued = submit(device, OP_READ, 0, 512)
    await device.resume()
    await settle()
    assert queued.status < 0
    assert await device.status() == [(0, 8, "delay", "1 0 0")]
    disks.clock.advance(100.0)
    assert content(queued) == b"x" * 512


async def test_nothing_waits_for_a_delay_when_the_device_is_removed() -> None:
    disks = Disks(a=8192)
    device = await disks.create("0 8 delay /a 0 100000")
    bio = submit(device, OP_WRITE, 0, b"x")
    await disks.registry.close()
    assert bio.status == 0
    assert disks["/a"].nr_closed == 1
