# SPDX-License-Identifier: Apache-2.0
"""dust: bad blocks, what reads and writes make of them, and the messages."""

import errno as errnos
import logging

import pytest

from nbdtarget.bio import OP_CACHE, OP_DISCARD, OP_FLUSH, OP_READ, OP_WRITE
from nbdtarget.common.errors import ConstructorError, TableError
from tests.support.tables import Disks, content, submit

BLOCK = 1024


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("/a 0", "Invalid argument count"),
        ("/a 0 512 1", "Invalid argument count"),
        ("/a x y", "Invalid block size parameter"),
        ("/a x 0", "Invalid block size parameter"),
        ("/a x 511", "Block size must be at least 512"),
        ("/a x 513", "Block size must be a power of 2"),
        ("/a x 8192", "Block size is too large"),
        ("/a x 512", "Invalid device offset sector"),
        ("/no 0 512", "Device lookup failed: /no: No such file"),
        ("/a 9 512", "/a too small for target: start=9"),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    disks = Disks(a=8192)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 8 dust {words}")
    assert str(caught.value).startswith(f"dust: {reason}")
    assert disks["/a"].nr_closed == ("small" in reason)


class Dust:
    """A dust device of 16 blocks of 1 KiB, from block 2 of its disk on."""

    def __init__(self) -> None:
        self.disks = Disks(a=64 * BLOCK)

    async def start(self) -> "Dust":
        self.device = await self.disks.create(f"0 32 dust /a 4 {BLOCK}")
        return self

    async def __call__(self, *words: str) -> str | None:
        return await self.device.message(0, words)

    async def status(self) -> str:
        return (await self.device.status())[0][3]

    def read(self, block: int, nr: int = 1) -> int:
        return submit(self.device, OP_READ, (block - 2) * BLOCK, nr * BLOCK).status

    def write(self, block: int, nr: int = 1) -> int:
        data = b"w" * nr * BLOCK
        return submit(self.device, OP_WRITE, (block - 2) * BLOCK, data).status


async def test_table_and_status() -> None:
    dust = await Dust().start()
    assert dust.device.table() == [(0, 32, "dust", f"/a 4 {BLOCK}")]
    assert await dust.status() == "/a bypass verbose"
    assert await dust("ENABLE") is None
    assert await dust("quiet") is None
    assert await dust.status() == "/a fail_read_on_bad_block quiet"
    await dust("disable")
    await dust("quiet")
    assert await dust.status() == "/a bypass verbose"


async def test_bad_block_matters_only_when_enabled() -> None:
    dust = await Dust().start()
    await dust("addbadblock", "5")
    assert (dust.read(5), dust.write(5)) == (0, 0)
    await dust("enable")
    assert (dust.read(4), dust.read(5), dust.read(6)) == (0, errnos.EIO, 0)
    assert dust.read(3, 8) == errnos.EIO
    assert submit(dust.device, OP_READ, 4 * BLOCK - 1, 1).status == errnos.EIO
    assert submit(dust.device, OP_READ, 4 * BLOCK, 1).status == 0
    assert submit(dust.device, OP_CACHE, 3 * BLOCK, 1).status == errnos.EIO
    await dust("disable")
    assert dust.read(5) == 0


async def test_write_repairs() -> None:
    dust = await Dust().start()
    for block in ("5", "7", "9"):
        await dust("addbadblock", block)
    await dust("enable")
    assert submit(dust.device, OP_FLUSH).status == 0
    assert dust.write(5) == 0
    assert dust.read(5) == 0
    assert submit(dust.device, OP_WRITE, 5 * BLOCK + 7, b"x").status == 0
    assert dust.read(7) == 0
    assert submit(dust.device, OP_DISCARD, 7 * BLOCK, BLOCK).status == 0
    assert await dust("countbadblocks") == "countbadblocks: 0 badblock(s) found"


async def test_flush_does_not_take_the_first_block_off_the_list() -> None:
    dust = await Dust().start()
    await dust("addbadblock", "2")
    await dust("enable")
    assert submit(dust.device, OP_FLUSH).status == 0
    assert dust.read(2) == errnos.EIO


async def test_write_fail_count_counts_down() -> None:
    dust = await Dust().start()
    await dust("addbadblock", "5", "2")
    await dust("enable")
    assert [dust.write(5), dust.read(5), dust.write(5)] == [errnos.EIO] * 3
    assert dust.write(5) == 0
    assert dust.read(5) == 0


async def test_large_write_is_carried_out_around_the_blocks_that_fail() -> None:
    dust = await Dust().start()
    await dust("addbadblock", "5", "1")
    await dust("addbadblock", "6")
    await dust("addbadblock", "8", "1")
    await dust("enable")
    data = bytes(range(64)) * 16 * 8
    assert submit(dust.device, OP_WRITE, BLOCK + 512, data).status == errnos.EIO
    assert await dust("listbadblocks") == "5\n8"
    image = bytearray((await dust.disks.image("/a"))[3 * BLOCK + 512 :][: len(data)])
    expected = bytearray(data)
    for block in (5, 8):
        at = (block - 3) * BLOCK - 512
        expected[at : at + BLOCK] = bytes(BLOCK)
    assert image == expected
    assert submit(dust.device, OP_WRITE, BLOCK + 512, data).status == 0
    assert content(submit(dust.device, OP_READ, BLOCK + 512, len(data))) == data


async def test_lists_longer_than_a_bio_are_searched_from_the_bio() -> None:
    dust = await Dust().start()
    for block in range(2, 18, 2):
        await dust("addbadblock", str(block))
    await dust("enable")
    assert [dust.read(block) == 0 for block in range(2, 18)] == [False, True] * 8


async def test_answers() -> None:
    dust = await Dust().start()
    assert await dust("listbadblocks") == "No blocks in badblocklist"
    assert await dust("clearbadblocks") == "dust_clear_badblocks: no badblocks found"
    assert await dust("addbadblock", "9") is None
    assert await dust("AddBadBlock", "64", "255") is None
    assert await dust("listbadblocks") == "9\n64"
    for block, found in (("9", "found"), ("8", "not found")):
        answer = f"dust_query_block: block {block} {found} in badblocklist"
        assert await dust("queryblock", block) == answer
    assert await dust("countbadblocks") == "countbadblocks: 2 badblock(s) found"
    assert await dust("removebadblock", "9") is None
    assert await dust("clearbadblocks") == "dust_clear_badblocks: badblocks cleared"


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("nonsense", "unrecognized message 'nonsense' received"),
        ("addbadblock", "addbadblock requires an additional argument"),
        ("queryblock", "queryblock requires an additional argument"),
        ("addbadblock x", "Invalid argument: x is not a block number"),
        ("addbadblock -1", "Invalid argument: -1 is not a block number"),
        ("addbadblock 65", "selected block value out of range"),
        ("addbadblock 1 256", "selected write fail count out of range"),
        ("addbadblock 5", "dust_add_block: block 5 already in badblocklist"),
        ("removebadblock 6", "dust_remove_block: block 6 not found in badblocklist"),
        ("removebadblock 5 1", "unrecognized message 'removebadblock' received"),
        ("enable 5", "unrecognized message 'enable' received"),
        ("a b c d", "invalid number of arguments '4'"),
    ],
)
async def test_message_refused(words: str, reason: str) -> None:
    dust = await Dust().start()
    await dust("addbadblock", "5")
    with pytest.raises(TableError) as caught:
        await dust(*words.split())
    assert caught.value.reason == reason
    assert caught.value.errno == errnos.EINVAL
    assert await dust("listbadblocks") == "5"


async def test_quiet_is_quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nbdtarget.targets.dust")
    dust = await Dust().start()
    await dust("addbadblock", "5")
    await dust("enable")
    dust.write(5)
    assert [record.getMessage() for record in caplog.records] == [
        "d: dust_add_block: badblock added at block 5 with write fail count 0",
        "d: enabling read failures on bad sectors",
        "d: block 5 removed from badblocklist by write",
    ]
    caplog.clear()
    await dust("quiet")
    await dust("addbadblock", "5")
    await dust("removebadblock", "5")
    assert caplog.records == []
