# SPDX-License-Identifier: Apache-2.0
"""Checklist 11.1, items 1 to 10: the kernel's own battery for a clone, sizes scaled down."""

import errno as errnos
import random

import pytest

from nbdtarget.common.errors import ConstructorError
from tests.support.clone_battery import MIB, Lab

REGION = 4096
SMALL = 16 * REGION


async def test_11_1_1_bring_up_clone_target(lab: Lab) -> None:
    lab.make_files(SMALL)
    await lab.create(SMALL, "8")
    assert (lab.work / "meta").exists()
    await lab.registry.remove("c")
    assert lab.registry.devices() == []
    assert [spy.held for spy in lab.spies.values()] == [[], [], []]


async def test_11_1_2_huge_region_size(lab: Lab) -> None:
    size = 1 << 30  # sparse
    lab.make_files(size, content=False)
    await lab.create(size, "524288 1 no_hydration")
    assert (await lab.status())[2:4] == ["524288", "0/4"]


async def test_11_1_3_non_power_of_2_region_size_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    for sectors in (9, 24, 1000):
        reason = await lab.refused(SMALL, str(sectors))
        assert reason == "Region size is not a power of 2"


async def test_11_1_3_too_small_region_size_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    assert await lab.refused(SMALL, "4") == "Invalid region size"


async def test_11_1_3_too_large_region_size_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    assert await lab.refused(SMALL, str(1 << 22)) == "Invalid region size"
    assert not (lab.work / "meta").exists()


async def test_11_1_4_largest_region_size_succeeds(lab: Lab) -> None:
    lab.make_files(SMALL)
    await lab.create(SMALL, str(1 << 21))
    assert (await lab.status())[3].endswith("/1")


async def test_11_1_5_too_small_metadata_dev_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    (lab.work / "meta").write_bytes(bytes(16 << 10))
    with pytest.raises(ConstructorError, match="Failed to load metadata") as caught:
        await lab.create(SMALL, "8")
    assert caught.value.errno == errnos.ENOSPC
    assert (lab.work / "meta").read_bytes() == bytes(16 << 10)


async def test_11_1_6_opening_with_different_region_size_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    await lab.create(SMALL, "8")
    await lab.registry.remove("c")
    assert "don't match the ones in metadata" in await lab.refused(SMALL, "16")
    await lab.create(SMALL, "8")


async def test_11_1_6_opening_with_different_target_size_fails(lab: Lab) -> None:
    lab.make_files(SMALL)
    await lab.create(SMALL, "8")
    await lab.registry.remove("c")
    reason = await lab.refused(SMALL - REGION, "8")
    assert "don't match the ones in metadata" in reason
    await lab.create(SMALL, "8")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("source", "Device size larger than source device"),
        ("dest", "Device size larger than destination device"),
    ],
)
async def test_11_1_7_data_devices_smaller_than_target_fails(
    lab: Lab, name: str, text: str
) -> None:
    lab.make_files(SMALL)
    with (lab.work / name).open("r+b") as file:
        file.truncate(SMALL - 512)
    assert await lab.refused(SMALL, "8") == text
    assert not (lab.work / "meta").exists()


@pytest.mark.parametrize("change", ["write", "discard"])
async def test_11_1_8_commit_on_flush(lab: Lab, change: str) -> None:
    lab.make_files(SMALL)
    device = await lab.create(SMALL, "8 1 no_hydration")

    async def change_region() -> None:
        if change == "write":
            await device.write(3 * REGION, b"x" * REGION)
        else:
            await device.discard(3 * REGION, REGION)

    generations = [lab.generation()]
    for _ in range(3):
        await change_region()
        await device.flush()
        generations.append(lab.generation())
    first = generations[0]
    assert generations == [first, first + 1, first + 1, first + 1]


@pytest.mark.parametrize("change", ["write", "discard"])
async def test_11_1_9_commit_periodically(lab: Lab, change: str) -> None:
    lab.make_files(SMALL)
    device = await lab.create(SMALL, "8 1 no_hydration")
    generations = [lab.generation()]
    for _ in range(3):
        if change == "write":
            await device.write(3 * REGION, b"x" * REGION)
        else:
            await device.discard(3 * REGION, REGION)
        lab.clock.advance(2)
        await lab.commit_under_way()
        generations.append(lab.generation())
    first = generations[0]
    assert generations == [first, first + 1, first + 1, first + 1]


async def test_11_1_10_pattern_stomp_test(lab: Lab) -> None:
    size = 8 * MIB
    content = lab.make_files(size)
    device = await lab.create(size, "8 1 no_hydration")
    assert await device.read(0, size) == content
    rng = random.Random(11)
    want = bytearray(content)

    async def stomp() -> None:
        for _ in range(200):
            length = rng.choice((512, 4096, 12288, 65536))
            at = rng.randrange((size - length) // 512) * 512
            data = rng.randbytes(length)
            await device.write(at, data)
            want[at : at + length] = data

    async def verify() -> None:
        assert await device.read(0, size) == want
        assert (lab.work / "source").read_bytes() == content, "the source is untouched"

    await stomp()
    await verify()
    await lab.hydrate()
    await verify()
    assert (lab.work / "dest").read_bytes() == want
    await stomp()
    await verify()
