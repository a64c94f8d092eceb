# SPDX-License-Identifier: Apache-2.0
"""Opening: which disks are refused because they begin like an image in a format, and which are not."""

import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.permissions import OTHER_DISK, OVERWRITE, Permission
from nbdtarget.devices.base import Device
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.cache.metadata import CacheMetadata
from tests.support.cache_parts import BLOCK
from tests.support.clock import SimClock
from tests.support.clone import REGION, Context, Rig
from tests.support.dm import make_registry

QCOW2 = b"QFI\xfb\0\0\0\3"
CACHE_WORDS = ["m", "c", "o", str(BLOCK // 512), "0", "smq", "0"]


class FileLike(MemoryDevice):
    may_be_container = True


def rig_on_files() -> Rig:
    rig = Rig()
    for spy in (rig.source, rig.destination):
        spy.may_be_container = True
    return rig


class Unreadable(FileLike):
    def submit(self, bio: Bio) -> None:
        bio.end(errnos.EIO if bio.op == OP_READ else 0)


def cache_context() -> Context:
    sizes = {
        "m": CacheMetadata.device_size_for(8),
        "c": 8 * BLOCK,
        "o": 64 * BLOCK,
    }
    devices: dict[str, Device] = {
        name: FileLike(size, name=name) for name, size in sizes.items()
    }
    return Context(devices, 64 * BLOCK, SimClock())


async def used_cache() -> Context:
    """A cache that has run, and is taken down again."""
    ctx = cache_context()
    target = await CacheTarget.ctr(ctx, CACHE_WORDS)
    await target.preresume()
    target.resume()
    target.presuspend()
    await target.postsuspend()
    await target.dtr()
    ctx.shared(ctx.devices["m"]).clear()
    return ctx


@pytest.mark.parametrize(
    ("role", "name"), [("source", "s"), ("destination", "d")], ids=["source", "dest"]
)
@pytest.mark.parametrize(
    "permissions", [frozenset(), frozenset({OVERWRITE})], ids=["plain", "overwrite"]
)
async def test_clone_refuses_an_image_before_anything_is_made(
    role: str, name: str, permissions: frozenset[Permission]
) -> None:
    rig = rig_on_files()
    rig.ctx.permissions = permissions
    await rig.ctx.devices[name].write(0, QCOW2)
    with pytest.raises(ConstructorError) as caught:
        await CloneTarget.ctr(rig.ctx, ["new", *rig.words[1:]])
    told = str(caught.value)
    assert f"{role} device {name} begins like a qcow2 image" in told
    assert f"raw:{name} if it is" in told
    assert "\n" not in told
    assert (rig.ctx.created, rig.ctx.nr_open) == ({}, 0)
    # A metadata device that is there, and blank, is not formatted either.
    with pytest.raises(ConstructorError, match="begins like a qcow2 image"):
        await CloneTarget.ctr(rig.ctx, rig.words)
    assert not any(await rig.metadata.read(0, 4096))


@pytest.mark.parametrize(("role", "name"), [("cache", "c"), ("origin", "o")])
async def test_cache_refuses_an_image_before_anything_is_made(
    role: str, name: str
) -> None:
    ctx = cache_context()
    await ctx.devices[name].write(0, b"vhdxfile")
    for metadata in ("new", "m"):
        with pytest.raises(ConstructorError) as caught:
            await CacheTarget.ctr(ctx, [metadata, *CACHE_WORDS[1:]])
        assert f"{role} device {name} begins like a vhdx image" in str(caught.value)
    assert (ctx.created, ctx.nr_open) == ({}, 0)
    assert not any(await ctx.devices["m"].read(0, 4096))


async def test_name_that_says_raw_is_believed() -> None:
    rig = rig_on_files()
    await rig.source.write(0, QCOW2)
    rig.ctx.devices["raw:s"] = rig.source
    rig.words[2] = "raw:s"
    await rig.restart()
    await rig.stop()


async def test_header_that_a_client_has_written_to_a_clone_is_its_own_affair() -> None:
    rig = await rig_on_files().start()
    bio = rig.bio(OP_WRITE, 0, REGION)
    assert bio.status == 0
    await rig.destination.write(0, QCOW2)
    await rig.stop()
    rig.ctx.shared(rig.metadata).clear()
    await rig.restart()
    # The header does not matter either to a table that is loaded while the clone is in use.
    beside = await CloneTarget.ctr(rig.ctx, rig.words)
    await beside.dtr()
    await rig.stop()


async def test_header_on_the_disks_of_a_known_cache_is_the_affair_of_its_clients() -> (
    None
):
    ctx = await used_cache()
    for name in ("c", "o"):
        await ctx.devices[name].write(0, QCOW2)
    target = await CacheTarget.ctr(ctx, CACHE_WORDS)
    await target.dtr()


async def test_another_disk_that_begins_like_an_image_is_refused_even_if_allowed() -> (
    None
):
    ctx = await used_cache()
    ctx.devices["o"] = FileLike(64 * BLOCK, name="o")
    await ctx.devices["o"].write(0, QCOW2)
    ctx.permissions = frozenset({OTHER_DISK})
    with pytest.raises(ConstructorError, match="begins like a qcow2 image"):
        await CacheTarget.ctr(ctx, CACHE_WORDS)
    assert ctx.nr_open == 0


async def test_mapped_device_is_not_looked_at() -> None:
    registry, opener = make_registry(lower=1 << 20, dest=1 << 20)
    await registry.create("lower", "0 2048 linear /lower 0")
    opener.open["/lower"].data[:8] = QCOW2
    opener.open["/lower"].may_be_container = True
    await registry.create("top", "0 2048 clone /new /dest raw:/dev/mapper/lower 8")
    await registry.remove("top")
    opener.sizes["/another"] = 1 << 20
    await registry.create("top", "0 2048 clone /other /another /dev/mapper/lower 8")


async def test_disk_that_cannot_be_read_is_told_of_and_not_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    rig = rig_on_files()
    rig.ctx.devices["s"] = Unreadable(rig.size, name="s")
    target = await CloneTarget.ctr(rig.ctx, rig.words)
    assert "s: its format cannot be looked at: s: read of" in caplog.text
    await target.dtr()
