# SPDX-License-Identifier: Apache-2.0
"""The constructor: the kernel's order of checks, and nothing touched when one fails."""

import errno as errnos
import re

import pytest

from nbdtarget.bio import OP_WRITE
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import SimClock
from tests.support.clone import REGION, Context, Rig

SIZE = 64 * REGION


def context(**sizes: int) -> Context:
    devices: dict[str, Device] = {
        name: MemoryDevice(size, name=name)
        for name, size in {"m": 1 << 20, "d": SIZE, "s": SIZE, **sizes}.items()
    }
    return Context(devices, SIZE, SimClock())


@pytest.mark.parametrize(
    ("line", "text", "errno"),
    [
        ("m d s", "Invalid number of arguments", errnos.EINVAL),
        ("no d s x", "Error opening metadata device", errnos.ENOENT),
        ("m no s x", "Error opening destination device", errnos.ENOENT),
        ("m d no x", "Error opening source device", errnos.ENOENT),
        ("m tiny no x", "Device size larger than destination device", errnos.EINVAL),
        ("m d tiny x", "Device size larger than source device", errnos.EINVAL),
        ("m d s x 9", "Invalid region size", errnos.EINVAL),
        ("m d s 8 9", "Invalid number of feature arguments", errnos.EINVAL),
        ("tiny d s 8", "Failed to load metadata", errnos.ENOSPC),
        ("foreign d s 8", "Failed to load metadata", errnos.EILSEQ),
    ],
)
async def test_refusal_touches_nothing(line: str, text: str, errno: int) -> None:
    ctx = context(tiny=8192, foreign=1 << 20)
    await ctx.devices["foreign"].write(0, b"LABELONE" * 512)
    written = {
        name: device.nr_chunks
        for name, device in ctx.devices.items()
        if isinstance(device, MemoryDevice)
    }
    with pytest.raises(ConstructorError) as caught:
        await CloneTarget.ctr(ctx, line.split())
    assert caught.value.reason.startswith(text)
    assert caught.value.errno == errno
    assert ctx.nr_open == 0
    for name, nr_chunks in written.items():
        device = ctx.devices[name]
        assert isinstance(device, MemoryDevice)
        assert device.nr_chunks == nr_chunks


async def test_missing_metadata_is_created_after_every_other_check() -> None:
    ctx = context()
    with pytest.raises(ConstructorError):
        await CloneTarget.ctr(ctx, ["new", "d", "s", "8", "1", "wrong"])
    assert ctx.created == {}
    target = await CloneTarget.ctr(ctx, ["new", "d", "s", "8"])
    assert ctx.created == {"new": CloneMetadata.device_size_for(64)}
    await target.dtr()
    assert ctx.nr_open == 0


async def test_other_geometry_is_refused_by_name() -> None:
    rig = await Rig().start()
    await rig.stop()
    with pytest.raises(ConstructorError, match="target size don't match the ones in"):
        await CloneTarget.ctr(rig.ctx, ["m", "d", "s", "16"])


async def test_other_geometry_is_refused_when_the_metadata_is_in_use() -> None:
    rig = await Rig().start()
    with pytest.raises(ConstructorError, match="target size don't match the ones in"):
        await CloneTarget.ctr(rig.ctx, ["m", "d", "s", "16"])
    await rig.stop()


async def used_rig() -> Rig:
    """A clone with one committed region, taken down again."""
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, REGION)
    await close(rig)
    return rig


async def close(rig: Rig) -> None:
    """Stop it and forget the metadata object, as when the last table is gone."""
    await rig.stop()
    rig.ctx.shared(rig.metadata).clear()


async def spoil(rig: Rig, offset: int) -> None:
    (byte,) = await rig.metadata.read(offset, 1)
    await rig.metadata.write(offset, bytes([byte ^ 1]))


async def test_rotten_metadata_is_refused_with_its_block_in_one_line() -> None:
    rig = await used_rig()
    await spoil(rig, 4 * 4096 + 40)
    with pytest.raises(ConstructorError) as caught:
        await CloneTarget.ctr(rig.ctx, rig.words)
    assert re.fullmatch(
        "Failed to load metadata: m is damaged: digest of journal record at block 4:"
        " expected [0-9a-f]{32}, found [0-9a-f]{32}; `nbdtarget metadata check m` shows"
        " what is damaged, and `nbdtarget metadata repair -i m -o NEW_FILE` saves what is"
        " left",
        caught.value.reason,
    )
    assert "\n" not in str(caught.value)
    assert caught.value.errno == errnos.EINVAL
    assert rig.ctx.nr_open == 0


@pytest.mark.parametrize("block", range(4))
async def test_rotten_superblock_copy_is_a_warning_and_healed(
    block: int, caplog: pytest.LogCaptureFixture
) -> None:
    rig = await used_rig()
    await spoil(rig, block * 4096 + 40)
    await rig.restart()
    assert f"(block {block})" in caplog.text
    assert await rig.hydrated() == "1/8"
    await rig.disk.flush()
    await rig.disk.flush()  # the other slot
    await close(rig)
    caplog.clear()
    await rig.restart()
    assert caplog.text == ""
    await rig.stop()


async def test_table_loaded_after_a_failure_starts_over_from_disk() -> None:
    rig = await Rig().start()
    rig.bio(OP_WRITE, 0, REGION)
    await rig.disk.flush()
    rig.bio(OP_WRITE, REGION, REGION)
    rig.metadata.fails = lambda bio: errnos.EIO if bio.op == OP_WRITE else 0
    assert (await rig.target.status()).endswith(" ro")
    rig.metadata.fails = lambda bio: 0
    failed = rig.target
    await rig.suspend()
    await rig.restart()
    await failed.dtr()
    assert (await rig.target.status()).split()[3] == "1/8"
    assert (await rig.target.status()).endswith(" rw")
    await rig.stop()


async def test_passdown_is_off_when_the_destination_can_not_discard() -> None:
    rig = Rig(words="8")
    rig.destination.can_discard = False
    await rig.start()
    assert " 1 no_discard_passdown 4 " in await rig.target.status(noflush=True)
    assert rig.target.table_words() == "m d s 8"
    await rig.stop()
