# SPDX-License-Identifier: Apache-2.0
"""The questions to a mapped device beside I/O: status, messages, extents, contexts."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.devices.base import (
    EXTENT_DATA,
    EXTENT_HOLE,
    EXTENT_ZERO,
    EXTENTS_MAX,
    Extent,
)
from tests.support.dm import (
    ProbeTarget,
    make,
    make_registry,
)

MIXED = "0 8 linear /a 8\n8 8 error\n16 8 zero\n24 8 linear /b 0"


async def test_status_does_not_flush_when_suspended_or_asked_not_to() -> None:
    device, _, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert await device.status() == [(0, 8, "probe", "flush")]
    assert await device.status(noflush=True) == [(0, 8, "probe", "noflush")]
    await device.suspend()
    assert await device.status() == [(0, 8, "probe", "noflush")]


async def test_status_of_a_target_that_is_being_replaced_delays_its_end() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert device.active is not None
    with device.active.use():
        remove = asyncio.create_task(registry.remove("x"))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert "dtr" not in ProbeTarget.lives
    await remove
    assert ProbeTarget.lives[-1] == "dtr"


async def test_message_reaches_the_target_at_the_sector() -> None:
    device, _, _ = await make("0 8 zero\n8 8 probe /a /b", a=4096, b=4096)
    assert await device.message(8, ["say", "-1"]) == "say -1"
    for sector, words in ((16, ["say"]), (-1, ["say"]), (8, []), (0, ["say"])):
        with pytest.raises(TableError, match="Invalid argument"):
            await device.message(sector, words)


async def test_message_to_a_device_without_a_table() -> None:
    registry, _ = make_registry()
    device = await registry.create("x", None)
    with pytest.raises(TableError) as caught:
        await device.message(0, ["say"])
    assert caught.value.errno == errnos.ENXIO


async def test_extents_are_joined_across_targets() -> None:
    device, _, _ = await make(MIXED, a=8192, b=4096)
    assert await device.extents(512, 16384 - 512) == [
        Extent(8192 - 512, EXTENT_DATA),
        Extent(4096, EXTENT_HOLE | EXTENT_ZERO),
        Extent(4096, EXTENT_DATA),
    ]
    with pytest.raises(DeviceError):
        await device.extents(0, 1 << 20)


async def test_extents_wait_while_suspended() -> None:
    device, _, _ = await make("0 8 zero")
    await device.suspend()
    asking = asyncio.create_task(device.extents(0, 4096))
    await asyncio.sleep(0)
    assert not asking.done()
    await device.resume()
    assert (await asking)[0].length == 4096


async def test_extents_end_where_a_target_told_no_more() -> None:
    device, _, opener = await make(MIXED, a=8192, b=4096)

    async def half(offset: int, length: int) -> list[Extent]:
        return [Extent(length // 2, EXTENT_DATA)]

    opener.open["/a"].extents = half  # type: ignore[method-assign]
    assert await device.extents(0, 16384) == [Extent(2048, EXTENT_DATA)]
    assert await device.extents(4096, 4096) == [Extent(4096, EXTENT_DATA)]


async def test_extents_of_very_many_targets_are_bounded() -> None:
    lines = [f"{at} 1 {'zero' if at % 2 else 'error'}" for at in range(EXTENTS_MAX + 9)]
    device, _, _ = await make("\n".join(lines))
    answer = await device.extents(0, device.size)
    assert sum(extent.length for extent in answer) == EXTENTS_MAX * 512


async def test_contexts_are_those_of_all_targets_and_0_elsewhere() -> None:
    device, registry, _ = await make("0 8 told 5\n8 8 zero\n16 8 told 7")
    assert device.contexts == ("tale",)
    assert await device.context_extents("tale", 512, 12288 - 512) == [
        Extent(4096 - 512, 5),
        Extent(4096, 0),
        Extent(4096, 7),
    ]
    assert await device.context_extents("other", 0, 12288) == [Extent(12288, 0)]
    with pytest.raises(DeviceError, match="tale"):
        await device.context_extents("tale", 0, 1 << 20)
    # After a swap of the table the context is described as empty.
    await registry.load("x", "0 24 zero")
    await device.resume()
    assert not device.contexts
    assert await device.context_extents("tale", 0, 12288) == [Extent(12288, 0)]


async def test_contexts_of_a_device_without_a_table_are_none() -> None:
    registry, _ = make_registry()
    assert (await registry.create("x", None)).contexts == ()


@pytest.mark.parametrize(
    "words",
    [
        "linear /dev/mapper/x 4",
        "delay /dev/mapper/x 4 0",
        "flakey /dev/mapper/x 4 1 0",
        "dust /dev/mapper/x 4 512",
    ],
)
async def test_contexts_shine_through_a_stack(words: str) -> None:
    _, registry, _ = await make("0 8 told 5\n8 8 zero")
    upper = await registry.create("upper", f"0 8 zero\n8 12 {words}")
    assert upper.contexts == ("tale",)
    assert await upper.context_extents("tale", 0, 20 * 512) == [
        Extent(4096, 0),
        Extent(4 * 512, 5),
        Extent(4096, 0),
    ]
    await registry.load("x", "0 16 zero")
    await registry.resume("x")
    assert not upper.contexts
