# SPDX-License-Identifier: Apache-2.0
"""What a clone says about its extents."""

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_HOLE, EXTENT_ZERO
from tests.nbdtarget.targets.clone.support import Rig

K64 = 1 << 16
THIN = EXTENT_HOLE | EXTENT_ZERO


async def test_unhydrated_zeroes_are_holes_where_the_destination_is_thin() -> None:
    content = b"a" * K64 + bytes(2 * K64) + b"b" * K64
    rig = await Rig(size=4 * K64, words="128 1 no_hydration", content=content).start()
    await rig.destination.device.write(K64, b"old")
    assert await rig.target.extents(0, 4 * K64) == [
        (K64, EXTENT_DATA),
        (K64, EXTENT_ZERO),  # room is there already
        (K64, THIN),
        (K64, EXTENT_DATA),
    ]


async def test_hydrated_regions_are_what_the_destination_says() -> None:
    content = b"a" * (4 * K64)
    rig = await Rig(size=4 * K64, words="128 1 no_hydration", content=content).start()
    await rig.disk.discard(K64, 2 * K64)
    assert await rig.target.extents(512, 3 * K64) == [
        (K64 - 512, EXTENT_DATA),
        (2 * K64, THIN),
        (512, EXTENT_DATA),
    ]


async def test_many_runs_are_described_in_several_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("nbdtarget.targets.clone.extents.RUNS_MAX", 256)
    rig = await Rig(
        size=1024 * 4096, words="8 1 no_hydration", content=bytes(1024 * 4096)
    ).start()
    for nr in range(0, 1024, 2):
        rig.bio(OP_WRITE, nr * 4096, 4096)
    extents = await rig.target.extents(0, 1024 * 4096)
    assert sum(extent.length for extent in extents) == 1024 * 4096
    assert extents[-1] == (768 * 4096, EXTENT_DATA)
