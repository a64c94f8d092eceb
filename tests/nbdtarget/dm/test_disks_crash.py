# SPDX-License-Identifier: Apache-2.0
"""A power cut between marking a disk and recording it leaves what starts, without a word.

Each moment at which something becomes durable is a picture of the machine: all files, with their
marks and times. From each of them the same table must start again and show what was flushed.
"""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices import identity
from nbdtarget.devices.base import Device
from nbdtarget.devices.file import device as file_device
from nbdtarget.targets import metadata_io
from nbdtarget_metadata.disks import Mark
from nbdtarget_metadata.operations import Answer, Operation, Write
from tests.support.disk_site import BLOCK, SAY_OTHER, SIZE, Site


class Camera:
    """Takes a picture of a site before and after each durable step."""

    def __init__(self, site: Site, album: Path, patch: pytest.MonkeyPatch) -> None:
        self.site = site
        self.album = album
        self.pictures: list[tuple[str, Path]] = []
        self.is_on = False
        carry_out, mark_fd = metadata_io._carry_out, identity.mark_fd

        async def carry_out_and_look(device: Device, operation: Operation) -> Answer:
            answer = await carry_out(device, operation)
            if isinstance(operation, Write):
                self.shoot(f"write at {operation.offset}")
            return answer

        def mark_and_look(fd: int, role: str, mark: Mark) -> bool:
            is_marked = mark_fd(fd, role, mark)
            self.shoot(f"mark of {role} {mark.generation}")
            return is_marked

        patch.setattr(metadata_io, "_carry_out", carry_out_and_look)
        patch.setattr(file_device, "mark_fd", mark_and_look)

    def shoot(self, what: str) -> None:
        if not self.is_on:
            return
        picture = self.album / str(len(self.pictures))
        shutil.copytree(self.site.directory, picture)
        self.pictures.append((what, picture))

    def hang_up(self) -> Iterator[str]:
        """Make each picture the site, one after the other."""
        self.is_on = False
        for what, picture in self.pictures:
            shutil.rmtree(self.site.directory)
            picture.rename(self.site.directory)
            yield what


@pytest.fixture
def camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Camera:
    (tmp_path / "site").mkdir()
    (tmp_path / "album").mkdir()
    return Camera(Site(tmp_path / "site"), tmp_path / "album", monkeypatch)


async def test_clone_starts_from_each_moment_of_its_life(camera: Camera) -> None:
    site = camera.site
    source = site.read("source")
    async with site.served(site.clone()) as device:
        await device.write(0, b"c" * BLOCK)
        await device.flush()
    camera.is_on = True
    async with site.served(site.clone()) as device:
        # The region is there already: no commit goes with this write.
        await device.write(0, b"C" * BLOCK)
        await device.flush()
        camera.shoot("flushed")
        await device.write(BLOCK, b"d" * BLOCK)
    camera.shoot("stopped")
    assert len(camera.pictures) > 10
    for what in camera.hang_up():
        async with site.served(site.clone()) as device:
            content = bytes(await device.read(0, SIZE))
        assert content[:1] in (b"c", b"C"), what
        assert content[BLOCK : 2 * BLOCK] in (
            source[BLOCK : 2 * BLOCK],
            b"d" * BLOCK,
        ), what
        assert content[2 * BLOCK :] == source[2 * BLOCK :], what


async def test_fresh_clone_starts_from_each_moment_of_its_first_start(
    camera: Camera,
) -> None:
    site = camera.site
    camera.is_on = True
    await site.started(site.clone())
    assert len(camera.pictures) > 8
    for what in camera.hang_up():
        async with site.served(site.clone()) as device:
            assert await device.read(0, SIZE) == site.read("source"), what


async def test_dirty_cache_starts_from_each_moment_of_its_life(camera: Camera) -> None:
    site = camera.site
    expected = await site.dirty_cache()
    camera.is_on = True
    async with site.served(site.cache()) as device:
        camera.shoot("served")
        await device.write(2 * BLOCK, b"e" * 512)  # to the origin: it is not cached
        await device.flush()
        camera.shoot("flushed")
    camera.shoot("stopped")
    assert len(camera.pictures) > 8
    for what in camera.hang_up():
        async with site.served(site.cache()) as device:
            content = bytes(await device.read(0, SIZE))
        assert content[: 2 * BLOCK] == expected[: 2 * BLOCK], what
        assert content[2 * BLOCK + 512 :] == expected[2 * BLOCK + 512 :], what


async def test_disk_that_was_accepted_is_known_once_a_commit_says_so(
    camera: Camera,
) -> None:
    site = camera.site
    content = await site.dirty_cache()
    shutil.copyfile(site.path("origin"), site.path("oo"))
    table = site.cache(origin="oo")
    camera.is_on = True
    await site.started(table, SAY_OTHER)
    needed_a_word = []
    for what in camera.hang_up():
        try:
            await site.started(table)
            needed_a_word.append(False)
        except ConstructorError:
            needed_a_word.append(True)
            await site.started(table, SAY_OTHER)
        async with site.served(table) as device:
            assert await device.read(0, SIZE) == content, what
    assert needed_a_word[0]
    assert not needed_a_word[-1]
    assert sorted(needed_a_word, reverse=True) == needed_a_word
