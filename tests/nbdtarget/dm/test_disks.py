# SPDX-License-Identifier: Apache-2.0
"""Disks that do not belong together are refused; those that do are found again, wherever they are.

The registry, the targets and real files: only the server is left out.
"""

import os
import shutil
from pathlib import Path

import msgspec
import pytest

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.permissions import MOVED, Permission
from nbdtarget.devices import identity, resolve
from nbdtarget.devices.file import device as file_device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import ReadOnlyMetadata
from nbdtarget_metadata.log.superblock import (
    superblock_writes,
)
from nbdtarget_metadata.operations import Write
from tests.support.disk_site import (
    BLOCK,
    MIB,
    NR_SECTORS,
    SAY_OTHER,
    SIZE,
    Site,
    _fields,
    _promoted,
)

SAY_MOVED: frozenset[Permission] = frozenset({MOVED})


def _nr_mapped(device: MappedDevice) -> int:
    return int(str(_fields(device)["cache_blocks_used"]))


@pytest.fixture
def site(tmp_path: Path) -> Site:
    return Site(tmp_path)


# ---- another disk ----


async def test_clone_goes_on_with_its_own_disks(site: Site) -> None:
    await site.half_cloned()
    for _ in range(3):
        async with site.served(site.clone()) as device:
            assert await device.read(0, MIB) == b"c" * MIB
            assert await device.read(MIB, MIB) == site.read("source")[MIB:]
            await device.write(0, b"c" * 512)


async def test_another_source_of_an_interrupted_clone_is_refused(site: Site) -> None:
    await site.half_cloned()
    site.write("other", os.urandom(SIZE))
    before = site.read("dest")
    line = await site.refused(site.clone(source="other"))
    assert str(site.path("source")) in line
    assert str(site.path("other")) in line
    assert await site.refused(site.clone(source="other"), SAY_MOVED)
    assert site.read("dest") == before
    await site.started(site.clone(source="other"), SAY_OTHER)


async def test_any_source_will_do_before_anything_is_copied_and_after_all_is(
    site: Site,
) -> None:
    site.write("other", os.urandom(SIZE))
    await site.started(site.clone())
    await site.started(site.clone(source="other"))
    async with site.served(site.clone()) as device:
        await device.write(0, b"c" * SIZE)
    async with site.served(site.clone(source="other")) as device:
        assert await device.read(0, SIZE) == b"c" * SIZE


async def test_changed_source_of_an_interrupted_clone_is_refused(site: Site) -> None:
    await site.half_cloned()
    site.change("source", 0, b"changed")
    line = await site.refused(site.clone())
    assert "its content has changed" in line
    await site.started(site.clone(), SAY_OTHER)
    await site.started(site.clone())


async def test_destination_exchanged_for_a_blank_file_is_refused(site: Site) -> None:
    await site.half_cloned()
    site.blank("dest")
    line = await site.refused(site.clone())
    assert "though it has its name" in line
    assert "its content differs" in line
    # The disk is refused even as moved, because the copied data is not there.
    await site.refused(site.clone(), SAY_MOVED)


async def test_blank_destination_of_a_finished_clone_is_refused(site: Site) -> None:
    async with site.served(site.clone()) as device:
        await device.write(0, b"c" * SIZE)
    site.blank("dest")
    await site.refused(site.clone())


async def test_another_origin_of_the_same_size_is_refused(site: Site) -> None:
    await site.dirty_cache()
    shutil.copy(site.path("origin"), site.path("oo"))
    before = site.read("oo")
    line = await site.refused(site.cache(origin="oo"))
    assert str(site.path("origin")) in line
    assert f"cache: {site.path('oo')} is not the origin" in line
    assert "--accept-other-disk" in line
    await site.refused(site.cache(origin="oo"), SAY_MOVED)  # origin is still there
    assert site.read("oo") == before


async def test_another_origin_is_refused_although_nothing_is_dirty(site: Site) -> None:
    await site.clean_cache()
    site.write("oo", os.urandom(SIZE))
    await site.refused(site.cache(origin="oo", mode="writethrough"))
    # A user who insists on this origin reads no block of the old one.
    async with site.served(
        site.cache(origin="oo", mode="writethrough"), SAY_OTHER
    ) as device:
        assert await device.read(0, SIZE) == site.read("oo")


async def test_blank_cache_with_dirty_blocks_is_refused(site: Site) -> None:
    await site.dirty_cache()
    site.blank("cache")
    line = await site.refused(site.cache())
    assert "is not the cache" in line
    await site.refused(site.cache(), SAY_MOVED)


async def test_lost_cache_with_nothing_dirty_is_replaced_by_an_empty_one(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    await site.clean_cache()
    site.blank("cache")
    async with site.served(site.cache(mode="writethrough")) as device:
        assert _nr_mapped(device) == 0
        assert await device.read(0, SIZE) == site.read("origin")
    (line,) = [each.getMessage() for each in caplog.records if "dropped" in each.msg]
    assert str(site.path("cache")) in line


async def test_lost_cache_is_not_replaced_by_a_disk_that_holds_data(
    site: Site,
) -> None:
    await site.clean_cache()
    site.path("cache").unlink()
    site.write("cache", b"precious" * (SIZE // 8))
    await site.refused(site.cache(mode="writethrough"))
    assert site.read("cache").startswith(b"precious")


async def test_disk_of_other_metadata_is_refused(site: Site) -> None:
    await site.half_cloned()
    for name in ("clone.meta", "dest"):
        site.path(name).rename(site.path(f"first.{name}"))
    site.blank("dest")
    await site.half_cloned()
    site.path("first.clone.meta").replace(site.path("clone.meta"))
    line = await site.refused(site.clone())
    assert "is marked as a disk of other metadata" in line
    site.path("first.dest").replace(site.path("dest"))
    await site.started(site.clone())


async def test_writeback_offline_refuses_another_origin_and_another_cache(
    site: Site,
) -> None:
    content = await site.dirty_cache()
    shutil.copyfile(site.path("origin"), site.path("oo"))
    shutil.copyfile(site.path("cache"), site.path("cc"))
    for names in (("cache", "oo"), ("cc", "origin")):
        before = site.read("oo"), site.read("origin")
        with pytest.raises(NbdTargetError, match=r"is not the (cache|origin) that"):
            await site.write_back(*names)
        assert (site.read("oo"), site.read("origin")) == before
    await site.write_back("cache", "origin")
    assert site.read("origin") == content
    # The tool's own writes do not count as a change by another program.
    async with site.served(site.cache()) as device:
        assert _nr_mapped(device) > 0
        assert await device.read(0, SIZE) == content


async def test_writeback_offline_takes_a_disk_that_moved_when_told_so(
    site: Site,
) -> None:
    content = await site.dirty_cache()
    shutil.copyfile(site.path("origin"), site.path("oo"))
    site.path("origin").unlink()
    await site.write_back("cache", "oo", SAY_MOVED)
    assert site.read("oo") == content
    async with site.served(site.cache(origin="oo")) as device:
        assert await device.read(0, SIZE) == content


# ---- old backups ----


@pytest.mark.parametrize("how", ["clean", "crash"])
async def test_metadata_of_an_old_backup_are_refused(site: Site, how: str) -> None:
    await site.half_cloned()
    shutil.copy(site.path("clone.meta"), site.path("backup"))
    async with site.served(site.clone()) as device:
        await device.write(MIB, b"d" * BLOCK)
        if how == "crash":
            mark = os.getxattr(site.path("dest"), "user.nbdtarget.destination")
    if how == "crash":
        os.setxattr(site.path("dest"), "user.nbdtarget.destination", mark)
    site.path("backup").replace(site.path("clone.meta"))
    line = await site.refused(site.clone())
    assert "older backup" in line
    await site.refused(site.clone(), SAY_MOVED)
    await site.started(site.clone(), SAY_OTHER)


async def test_disk_of_an_old_backup_is_refused(site: Site) -> None:
    await site.half_cloned()
    _copy_whole(site.path("dest"), site.path("backup"))
    async with site.served(site.clone()) as device:
        await device.write(MIB, b"d" * BLOCK)
    site.path("backup").replace(site.path("dest"))
    assert "older backup" in await site.refused(site.clone())


# ---- the same disk elsewhere ----


def _copy_whole(source: Path, target: Path) -> None:
    """As `cp -a` does it."""
    shutil.copy2(source, target)  # with extended attributes
    assert os.listxattr(target) == os.listxattr(source)


async def test_renamed_disks_are_found_again(site: Site) -> None:
    content = await site.dirty_cache()
    site.path("origin").rename(site.path("o2"))
    site.path("cache").rename(site.path("c2"))
    async with site.served(site.cache(origin="o2", cache="c2")) as device:
        assert await device.read(0, SIZE) == content
    assert site.recorded("cache.meta", "origin").name == str(site.path("o2"))


async def test_copy_of_disks_and_metadata_with_their_marks_starts(site: Site) -> None:
    content = await site.dirty_cache()
    for name in ("origin", "cache", "cache.meta"):
        _copy_whole(site.path(name), site.path(f"copy.{name}"))
    site.path("copy.cache.meta").replace(site.path("cache.meta"))
    table = site.cache(origin="copy.origin", cache="copy.cache")
    async with site.served(table) as device:
        assert await device.read(0, SIZE) == content


async def test_copy_of_disks_without_marks_starts_when_told_that_it_moved(
    site: Site,
) -> None:
    content = await site.dirty_cache()
    for name in ("origin", "cache"):
        shutil.copyfile(site.path(name), site.path(f"copy.{name}"))
        site.path(name).unlink()
    table = site.cache(origin="copy.origin", cache="copy.cache")
    line = await site.refused(table)
    assert "--moved" in line
    async with site.served(table, SAY_MOVED) as device:
        assert await device.read(0, SIZE) == content
    async with site.served(table) as device:  # once is enough
        assert await device.read(0, SIZE) == content


async def test_table_can_be_loaded_again_while_it_is_served(site: Site) -> None:
    await site.dirty_cache()
    registry = Registry(resolve)
    device = await registry.create("d", site.cache())
    await device.write(BLOCK, b"e" * BLOCK)
    await registry.load("d", site.cache())
    await device.suspend()
    await device.resume()
    assert await device.read(BLOCK, BLOCK) == b"e" * BLOCK
    await registry.remove("d")


# ---- changed while not in use ----


async def test_clean_blocks_are_dropped_if_the_origin_was_used_without_the_cache(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    await site.clean_cache()
    site.change("origin", 0, b"new" * 1000)
    async with site.served(site.cache(mode="writethrough")) as device:
        assert await device.read(0, SIZE) == site.read("origin")
    (line,) = [each.getMessage() for each in caplog.records if "dropped" in each.msg]
    assert str(site.path("origin")) in line
    assert "4 cached blocks" in line


async def test_clean_blocks_are_kept_if_the_origin_was_only_read(site: Site) -> None:
    await site.clean_cache()
    site.read("origin")
    site.path("origin").chmod(0o640)
    async with site.served(site.cache(mode="writethrough")) as device:
        assert _nr_mapped(device) >= 4


async def test_changed_origin_is_refused_while_blocks_are_dirty(site: Site) -> None:
    await site.dirty_cache()
    site.change("origin", MIB, b"new")
    line = await site.refused(site.cache())
    assert str(site.path("origin")) in line
    assert "written to while it was not in use" in line
    await site.refused(site.cache(), SAY_MOVED)
    async with site.served(site.cache(), SAY_OTHER) as device:
        assert await device.read(0, BLOCK) == b"d" * BLOCK
        assert bytes(await device.read(MIB, 3)) == b"new"


async def test_change_of_an_origin_that_has_no_time_is_seen_at_its_head(
    site: Site,
) -> None:
    await site.clean_cache()
    before = site.recorded("cache.meta", "origin").mtime_ns
    site.change("origin", 1024, b"mounted")
    os.utime(site.path("origin"), ns=(before, before))  # as a block device has none
    async with site.served(site.cache(mode="writethrough")) as device:
        assert _nr_mapped(device) == 0
        assert await device.read(0, SIZE) == site.read("origin")


async def test_disks_of_a_dirty_cache_may_grow_while_it_is_not_in_use(
    site: Site,
) -> None:
    content = await site.dirty_cache()
    for name in ("origin", "cache"):
        os.truncate(site.path(name), 2 * SIZE)
    async with site.served(site.cache()) as device:
        assert await device.read(0, SIZE) == content


async def test_changed_destination_of_an_interrupted_clone_is_refused(
    site: Site,
) -> None:
    await site.half_cloned()
    site.change("dest", MIB + MIB // 2, b"new")
    line = await site.refused(site.clone())
    assert "two states would be mixed" in line
    await site.started(site.clone(), SAY_OTHER)


async def test_finished_destination_may_be_used_alone(site: Site) -> None:
    async with site.served(site.clone()) as device:
        await device.write(0, b"c" * SIZE)
    site.change("dest", 0, b"new")
    async with site.served(site.clone()) as device:
        assert bytes(await device.read(0, 3)) == b"new"


async def test_invalidate_all_gives_up_what_is_clean_while_it_is_served(
    site: Site,
) -> None:
    async with site.served(site.cache(mode="writethrough")) as device:
        await device.message(0, ["pin", "0-4"])
        await _promoted(device, 4)
        site.change("origin", 0, b"new" * 1000)
        assert bytes(await device.read(0, 3)) != b"new"
        await device.message(0, ["invalidate_all"])
        assert _nr_mapped(device) == 0
        assert await device.read(0, SIZE) == site.read("origin")


async def test_discarded_block_written_without_the_cache_keeps_its_data(
    site: Site,
) -> None:
    """A writeback cache fills a discarded block with zeroes when it promotes the block."""
    async with site.served(site.cache()) as device:
        await device.discard(0, SIZE)
    site.change("origin", 0, b"new" * 1000)
    table = site.cache().replace("migration_threshold 0", "migration_threshold 1048576")
    async with site.served(table) as device:
        await device.message(0, ["warm", "0-2"])
        await _promoted(device, 2)
        assert bytes(await device.read(0, 3000)) == b"new" * 1000
    assert site.read("origin")[:3000] == b"new" * 1000


@pytest.mark.parametrize("mode", ["writeback", "writethrough"])
async def test_write_to_the_origin_between_load_and_resume_is_seen(
    site: Site, mode: str
) -> None:
    registry = Registry(resolve)
    cache = site.cache(mode=mode).replace("threshold 0", "threshold 1048576")
    linear = f"0 {NR_SECTORS} linear {site.path('origin')} 0"
    device = await registry.create("d", cache)
    await device.message(0, ["warm", "0-2"])
    await _promoted(device, 2)
    await device.discard(2 * BLOCK, 2 * BLOCK)
    for table in (linear, cache):
        await registry.load("d", table)
        if table is cache:  # the linear table is live still
            await device.write(0, b"late" * 1000)
            await device.write(2 * BLOCK, b"late" * 1000)
        await registry.resume("d")
    # Blocks that were cached have been given up, and are read from the origin.
    assert bytes(await device.read(0, 4000)) == b"late" * 1000
    await device.message(0, ["warm", "0-4"])
    await _promoted(device, 4)
    for offset in (0, 2 * BLOCK):
        assert bytes(await device.read(offset, 4000)) == b"late" * 1000
    await registry.remove("d")


async def test_invalidate_all_keeps_dirty_blocks_and_says_so(site: Site) -> None:
    await site.dirty_cache()
    async with site.served(site.cache()) as device:
        with pytest.raises(TableError, match="1 dirty blocks stay"):
            await device.message(0, ["invalidate_all"])
        assert await device.read(0, BLOCK) == b"d" * BLOCK


async def test_stop_whose_compaction_fails_meanwhile_is_a_stop_all_the_same(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.half_cloned()

    def refuse(*_: object) -> None:
        raise ReadOnlyMetadata

    async with site.served(site.clone()) as device:
        monkeypatch.setattr(CloneMetadata, "record_disks", refuse)
        await device.suspend()
        assert device.active is not None
        assert not device.active.failed
    monkeypatch.undo()
    await site.started(site.clone())


# ---- evidence that cannot be had ----


async def test_file_system_without_marks_is_no_error(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(os, "setxattr", refuse)
    content = await site.dirty_cache()
    assert site.recorded("cache.meta", "origin").mark_generation == -1
    async with site.served(site.cache()) as device:
        assert await device.read(0, SIZE) == content
    site.path("origin").rename(site.path("o2"))
    await site.started(site.cache(origin="o2"))
    shutil.copyfile(site.path("o2"), site.path("oo"))
    assert "o2 is still there" in await site.refused(site.cache(origin="oo"))


async def test_time_that_a_power_cut_may_take_back_is_not_recorded(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    await site.half_cloned()
    assert site.recorded("clone.meta", "destination").mtime_ns
    for module in (identity, file_device):
        monkeypatch.setattr(module, "sync_attributes_fd", lambda fd: False)
    await site.started(site.clone())
    assert site.recorded("clone.meta", "destination").mtime_ns == 0
    monkeypatch.undo()
    os.utime(site.path("dest"))
    await site.started(site.clone())


async def test_metadata_without_a_record_take_the_disks_that_they_are_given(
    site: Site,
) -> None:
    await site.half_cloned()
    _forget_disks(site, "clone.meta")
    shutil.copyfile(site.path("dest"), site.path("d2"))
    await site.started(site.clone(dest="d2"))
    assert site.recorded("clone.meta", "destination").name == str(site.path("d2"))
    # From now on it is known.
    await site.refused(site.clone(dest="dest"))


def _forget_disks(site: Site, name: str) -> None:
    """Make the metadata such as an older version has left them."""

    superblock = site.superblock(name)
    with site.path(name).open("r+b") as file:
        for step in range(2):
            plain = msgspec.structs.replace(
                superblock, disks=b"", generation=superblock.generation + step
            )
            for write in superblock_writes(plain):
                assert isinstance(write, Write)
                file.seek(write.offset)
                file.write(write.data)
