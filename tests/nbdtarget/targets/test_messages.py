# SPDX-License-Identifier: Apache-2.0
"""A message that is refused names those that the target takes; and these are the ones that it takes."""

import pytest

from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.targets.registry import TARGET_TYPES
from tests.support.tables import Disks

MIB = 1 << 20
TABLES = {
    "linear": "linear /a 0",
    "zero": "zero",
    "dust": "dust /a 0 512",
    "log-writes": "log-writes /a /b",
    "powercut": "powercut /a 0",
    "scratch": "scratch /a 0 /b",
    "clone": "clone /m /a /b 8 1 no_hydration",
    "cache": "cache /m /a /b 64 1 passthrough default 0",
}
# A word that stands for each word in capital letters.
WORDS = {
    "BLOCK": "1",
    "[WRITES]": "2",
    "BLOCKS...": "0-1",
    "[BLOCKS...]": "0-1",
    "SECTORS": "4096",
    "BYTES": "10M",
    "REGIONS": "2",
    "NUMBER": "2",
    "TEXT": "here",
    "keep|drop|tear|mixed": "drop",
    "[SEED]": "7",
}
# Messages of the right form that are refused here for other reasons, and the words of the refusal.
ELSEWHERE = {
    "on": "the power is on",
    "source_url URL": "is not reached by a URL",
    "removebadblock BLOCK": "not found in badblocklist",
    "pin BLOCKS...": "this cache caches nothing new: it is in passthrough mode, or read-only",
    "warm BLOCKS...": "this cache caches nothing new: it is in passthrough mode, or read-only",
}


async def make(type_name: str) -> MappedDevice:
    disks = Disks(a=4 * MIB, b=4 * MIB, m=4 * MIB)
    return await disks.create(f"0 2048 {TABLES[type_name]}")


@pytest.mark.parametrize("type_name", TABLES)
async def test_unknown_message_names_those_that_there_are(type_name: str) -> None:
    device = await make(type_name)
    with pytest.raises(TableError) as caught:
        await device.message(0, ["help"])
    for usage in TARGET_TYPES[type_name].messages:
        assert usage in str(caught.value)
    assert f"`{type_name}'" in str(caught.value)
    await device.close()


@pytest.mark.parametrize(
    ("type_name", "usage"),
    [(name, usage) for name in TABLES for usage in TARGET_TYPES[name].messages],
)
async def test_each_message_that_is_named_is_taken(type_name: str, usage: str) -> None:
    device = await make(type_name)
    message = device.message(0, [WORDS.get(word, word) for word in usage.split()])
    if usage in ELSEWHERE:
        with pytest.raises(TableError, match=ELSEWHERE[usage]):
            await message
    else:
        await message
    await device.close()


def test_every_type_with_messages_is_tried() -> None:
    with_messages = {name for name, each in TARGET_TYPES.items() if each.messages}
    assert with_messages <= TABLES.keys()


@pytest.mark.parametrize("verb", ["pin", "warm", "unpin"])
async def test_message_about_blocks_needs_a_block(verb: str) -> None:
    device = await make("cache")
    with pytest.raises(TableError, match=f"`{verb}' needs a block"):
        await device.message(0, [verb])
    await device.close()


@pytest.mark.parametrize(
    ("line", "hint"),
    [
        ("clone /m /a /b 64K", "`64K' is not a number of sectors of 512 bytes"),
        ("clone /m /a /b 8 1 hydrate_reads", "none of no_hydration, "),
        ("clone /m /a /b 8 0 2 threshold 1", "none of hydration_threshold, "),
        ("clone /m /a /b 8 0 2 hydration_rate x", "bytes a second, for example 10M"),
        ("cache /m /a /b 64K 0 default 0", "`64K' is not a number of sectors"),
        ("cache /m /a /b 64 1 writebak default 0", "none of writeback, "),
        ("cache /m /a /b 64 0 default 2 migration_rate x", "for example 10M"),
    ],
)
async def test_refusal_of_a_word_says_what_would_be_right(line: str, hint: str) -> None:
    disks = Disks(a=4 * MIB, b=4 * MIB, m=4 * MIB)
    with pytest.raises(ConstructorError) as caught:
        await disks.create(f"0 2048 {line}")
    assert hint in str(caught.value)
