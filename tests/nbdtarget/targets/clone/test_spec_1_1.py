# SPDX-License-Identifier: Apache-2.0
"""Checklist 1.1: the constructor's steps, in order, with the kernel's texts."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.mode import Mode
from tests.support.clock import SimClock, settle
from tests.support.clone import REGION, Context, Disk, Rig

SIZE = 64 * REGION

# Each line fails in its own step, and would in every later one that a line can be wrong in.
STEPS = [
    ("1", "m d s", "Invalid number of arguments", errnos.EINVAL),
    ("1 none", "", "Invalid number of arguments", errnos.EINVAL),
    ("2", "no no no x 9", "Error opening metadata device", errnos.ENOENT),
    ("3 open", "m no no x 9", "Error opening destination device", errnos.ENOENT),
    (
        "3 size",
        "m small no x 9",
        "Device size larger than destination device",
        errnos.EINVAL,
    ),
    ("4 open", "m d no x 9", "Error opening source device", errnos.ENOENT),
    ("4 size", "m d small x 9", "Device size larger than source device", errnos.EINVAL),
    ("5 number", "m d s x 99", "Invalid region size", errnos.EINVAL),
    ("5 hexadecimal", "m d s 0x8 99", "Invalid region size", errnos.EINVAL),
    ("5 negative", "m d s -8 99", "Invalid region size", errnos.EINVAL),
    ("5 below 8", "m d s 4 99", "Invalid region size", errnos.EINVAL),
    ("5 above 2097152", "m d s 4194304 99", "Invalid region size", errnos.EINVAL),
    ("5 power", "m d s 24 99", "Region size is not a power of 2", errnos.EINVAL),
    (
        "5 block of source",
        "m d big-blocks 8 99",
        "Region size is not a multiple of device logical block size",
        errnos.EINVAL,
    ),
    (
        "5 block of destination",
        "m big-blocks s 8 99",
        "Region size is not a multiple of device logical block size",
        errnos.EINVAL,
    ),
    ("7 above the bound", "m d s 8 99", "Invalid number of feature arguments", 22),
    ("7 no number", "m d s 8 x", "Invalid number of feature arguments", 22),
    (
        "7 more than there are",
        "m d s 8 2 no_hydration",
        "Invalid number of feature arguments",
        22,
    ),
    ("7 unknown", "m d s 8 1 hydration 99", "Invalid feature argument", errnos.EINVAL),
    (
        "8 needs a feature count",
        "m d s 8 2 hydration_threshold 4",
        "Invalid feature argument",
        22,
    ),
    ("8 above the bound", "m d s 8 0 99", "Invalid number of core arguments", 22),
    (
        "8 words left over count as it",
        "m d s 8 1 no_hydration trailing",
        "Invalid number of core arguments",
        22,
    ),
    (
        "8 more than there are",
        "m d s 8 0 4 hydration_threshold 1",
        "Invalid number of core arguments",
        22,
    ),
    (
        "8 odd",
        "m d s 8 0 1 hydration_threshold",
        "Number of core arguments must be even",
        22,
    ),
    ("8 unknown", "m d s 8 0 2 threshold x", "Invalid core argument", errnos.EINVAL),
    (
        "8 value",
        "foreign d s 8 0 2 hydration_threshold -1",
        "Invalid value for argument `hydration_threshold'",
        22,
    ),
    (
        "8 value of 33 bits",
        "foreign d s 8 0 2 hydration_batch_size 4294967296",
        "Invalid value for argument `hydration_batch_size'",
        22,
    ),
    ("9 foreign", "foreign d s 8", "Failed to load metadata", errnos.EILSEQ),
    ("9 too small", "small d s 8", "Failed to load metadata", errnos.ENOSPC),
]


def context(length: int = SIZE) -> Context:
    sizes = {"m": 1 << 20, "foreign": 1 << 20, "small": 8192, "d": length, "s": length}
    devices: dict[str, Device] = {
        name: MemoryDevice(size, name=name) for name, size in sizes.items()
    }
    devices["big-blocks"] = MemoryDevice(length, name="big-blocks")
    devices["big-blocks"].logical_block_size = 8192
    return Context(devices, length, SimClock())


async def refused(ctx: Context, line: str) -> ConstructorError:
    with pytest.raises(ConstructorError) as caught:
        await CloneTarget.ctr(ctx, line.split())
    assert ctx.nr_open == 0, "what was opened is closed again"
    return caught.value


@pytest.mark.parametrize(
    ("line", "text", "errno"),
    [step[1:] for step in STEPS],
    ids=[step[0] for step in STEPS],
)
async def test_1_1_first_failing_step_gives_the_error(
    line: str, text: str, errno: int
) -> None:
    ctx = context()
    await ctx.devices["foreign"].write(0, b"LABELONE" * 512)
    error = await refused(ctx, line)
    assert error.reason.startswith(text)
    assert error.errno == errno
    metadata = ctx.devices["m"]
    assert not any(await metadata.read(0, metadata.size)), "nothing later is touched"


async def test_1_1_step_2_and_9_missing_metadata_is_made_last() -> None:
    # The kernel wants a device that is there. A file that is missing is made, at the right size.
    ctx = context()
    await refused(ctx, "new d s 8 1 wrong")
    assert ctx.created == {}
    target = await CloneTarget.ctr(ctx, ["new", "d", "s", "8"])
    assert ctx.created == {"new": CloneMetadata.device_size_for(64)}
    await target.dtr()


async def test_1_1_step_2_excess_of_the_metadata_device_is_unused() -> None:
    ctx = context()
    ctx.devices["m"] = MemoryDevice(64 << 30, name="m")
    target = await CloneTarget.ctr(ctx, ["m", "d", "s", "8"])
    assert (await target.status()).split()[1].endswith(f"/{(64 << 30) // 4096}")
    assert target._metadata._superblock.arena_blocks < 300
    await target.dtr()


async def test_1_1_step_3_and_4_excess_of_data_devices_is_never_touched() -> None:
    ctx = context()
    for name in ("d", "s"):
        ctx.devices[name] = MemoryDevice(2 * SIZE, name=name)
        await ctx.devices[name].write(SIZE, b"beyond" * 1000)
    target = await CloneTarget.ctr(
        ctx, ["m", "d", "s", "8", "0", "2", "hydration_threshold", "64"]
    )
    target.resume()
    await settle(300)
    assert (await target.status()).split()[3] == "64/64"
    await Disk(target).discard(0, SIZE)
    for name in ("d", "s"):
        assert await ctx.devices[name].read(SIZE, 6000) == b"beyond" * 1000
    target.presuspend()
    await target.postsuspend()
    await target.dtr()


async def test_1_1_step_4_source_is_opened_read_only() -> None:
    class Modes(Context):
        async def open_device(
            self, name: str, *, read_only: bool = False, shared: bool = False
        ) -> Device:
            modes[name] = read_only
            return await super().open_device(name, read_only=read_only)

    modes: dict[str, bool] = {}
    plain = context()
    ctx = Modes(plain.devices, SIZE, plain.clock)
    target = await CloneTarget.ctr(ctx, ["m", "d", "s", "8"])
    assert modes == {"m": False, "d": False, "s": True}
    await target.dtr()


@pytest.mark.parametrize(("word", "regions"), [("8", 64), ("64", 8), ("2097152", 1)])
async def test_1_1_step_5_region_sizes_from_4_kib_to_1_gib(
    word: str, regions: int
) -> None:
    target = await CloneTarget.ctr(context(), ["m", "d", "s", word])
    assert (await target.status()).split()[2:4] == [word, f"0/{regions}"]
    await target.dtr()


async def test_1_1_step_5_number_above_32_bits_is_refused() -> None:
    # The kernel reads 32 bits of it: 4294967304 is 8 there.
    assert (
        await refused(context(), "m d s 4294967304")
    ).reason == "Invalid region size"


async def test_1_1_step_6_region_count_is_rounded_up() -> None:
    target = await CloneTarget.ctr(context(SIZE + 512), ["m", "d", "s", "8"])
    assert (await target.status()).split()[3] == "0/65"
    await target.dtr()


async def test_1_1_step_6_too_many_regions() -> None:
    ctx = context((REGION << 31) + 512)
    error = await refused(ctx, "m d s 8 99")
    assert error.reason == "Too many regions. Consider increasing the region size"
    assert error.errno == errnos.EINVAL


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ("", "0 4 hydration_threshold 1 hydration_batch_size 1"),
        ("0", "0 4 hydration_threshold 1 hydration_batch_size 1"),
        ("1 No_Hydration", "1 no_hydration 4 "),
        ("2 no_hydration NO_HYDRATION", "1 no_hydration 4 "),
        ("1 no_discard_passdown", "1 no_discard_passdown 4 "),
        ("0 2 HYDRATION_threshold 7", "0 4 hydration_threshold 7 "),
        ("0 4 hydration_threshold 7 hydration_threshold 8", "hydration_threshold 8 "),
        ("0 2 hydration_threshold 0", "hydration_threshold 0 "),
        ("0 2 hydration_batch_size 0", "hydration_batch_size 0"),
        ("0 2 hydration_batch_size 4294967295", "hydration_batch_size 4294967295"),
        ("0 0 words after the core group", "0 4 hydration_threshold 1 "),
    ],
)
async def test_1_1_step_7_and_8_accepted_and_defaults(words: str, status: str) -> None:
    target = await CloneTarget.ctr(context(), ["m", "d", "s", "8", *words.split()])
    assert f" {status}" in await target.status()
    await target.dtr()


@pytest.mark.parametrize("change", ["region size", "target size", "rot", "shrunk"])
async def test_1_1_step_9_metadata_that_does_not_fit_is_refused(change: str) -> None:
    rig = await Rig(size=SIZE).start()
    rig.bio(OP_WRITE, 0, REGION)
    await rig.stop()
    rig.ctx._shared.clear()  # as when the device is closed
    words = rig.words
    if change == "region size":
        words = ["m", "d", "s", "16"]
    elif change == "target size":
        rig.ctx.length -= REGION
    elif change == "rot":
        for at in (0, 4096, 8192, 12288):
            await rig.metadata.device.write(at + 100, b"rot")
    else:
        size = 16384 + 3 * 4096
        smaller = MemoryDevice(size, name="m")
        await smaller.write(0, await rig.metadata.device.read(0, size))
        rig.ctx.devices["m"] = smaller
    error = await refused(rig.ctx, " ".join(words))
    assert error.reason.startswith("Failed to load metadata: ")
    assert error.errno == (errnos.ENOSPC if change == "shrunk" else errnos.EINVAL)


@pytest.mark.parametrize("op", [OP_READ, OP_WRITE])
async def test_1_1_step_9_metadata_device_that_fails_gives_its_errno(op: int) -> None:
    rig = Rig(size=SIZE)
    rig.metadata.fails = lambda bio: errnos.EREMOTEIO if bio.op == op else 0
    error = await refused(rig.ctx, " ".join(rig.words))
    assert error.reason.startswith("Failed to load metadata: ")
    assert error.errno == errnos.EREMOTEIO


async def test_1_1_step_10_metadata_without_write_mode_is_eperm(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    original = CloneMetadata.__init__

    def init(self: CloneMetadata, **arguments: object) -> None:
        original(self, **arguments)  # type: ignore[arg-type]
        self.mode = Mode.RO  # as with a feature bit that a later version has defined

    monkeypatch.setattr(CloneMetadata, "__init__", init)
    error = await refused(context(), "m d s 8")
    assert error.errno == errnos.EPERM
    assert error.reason == (
        "Unable to get write access to metadata, please check/repair metadata."
        " A newer version has written it, with features that this version may only read."
    )
