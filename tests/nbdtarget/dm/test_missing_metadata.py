# SPDX-License-Identifier: Apache-2.0
"""Metadata that is missing, or blank, is not made anew for a disk that holds data."""

import errno as errnos
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.permissions import MOVED, OTHER_DISK, OVERWRITE, Permission
from nbdtarget.config.devices import ConfiguredDevices
from nbdtarget.config.file import read
from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.clone.metadata import CloneMetadata

SIZE = 1 << 20
SECTORS = SIZE // 512
PRECIOUS = b"precious" * 512
SIZES = {
    "clone": CloneMetadata.device_size_for(SIZE // 4096),
    "cache": CacheMetadata.device_size_for(SIZE // (32 << 10)),
}


class Work:
    """A registry, and the files m (not there at first), d and s of a table line."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.registry = Registry(resolve)
        for name in "ds":
            with (path / name).open("wb") as file:
                file.truncate(SIZE)

    def line(self, kind: str) -> str:
        words = "8" if kind == "clone" else "64 0 smq 0"
        names = " ".join(str(self.path / name) for name in "mds")
        return f"0 {SECTORS} {kind} {names} {words}"

    def fill_disk(self) -> None:
        with (self.path / "d").open("r+b") as file:
            file.seek(12 << 10)
            file.write(PRECIOUS)

    def make_metadata(self, kind: str, *, is_missing: bool) -> None:
        if not is_missing:
            with (self.path / "m").open("wb") as file:
                file.truncate(SIZES[kind])

    def is_untouched(self, *, is_missing: bool) -> bool:
        metadata = self.path / "m"
        disk = (self.path / "d").read_bytes()
        is_blank = (
            not metadata.exists() if is_missing else not any(metadata.read_bytes())
        )
        return is_blank and disk[12 << 10 :][: len(PRECIOUS)] == PRECIOUS


@pytest.fixture
async def work(tmp_path: Path) -> AsyncIterator[Work]:
    work = Work(tmp_path)
    yield work
    await work.registry.close()


KINDS = pytest.mark.parametrize("kind", ["clone", "cache"])
STATES = pytest.mark.parametrize("is_missing", [True, False])


def check(error: ConstructorError, work: Work, kind: str, *, is_missing: bool) -> None:
    role = {"clone": "destination", "cache": "cache"}[kind]
    state = "is missing" if is_missing else "is blank"
    assert error.reason == (
        f"{role} device {work.path}/d holds data (byte 12288 is not zero), but its"
        f" metadata {work.path}/m {state}: name the metadata that belongs to it, or"
        " give --overwrite if what it holds may be lost"
    )
    assert error.errno == errnos.EEXIST
    assert error.allowed_by == OVERWRITE
    assert work.is_untouched(is_missing=is_missing)


@KINDS
@STATES
async def test_create_and_load_refuse_new_metadata_for_a_disk_that_holds_data(
    work: Work, kind: str, is_missing: bool
) -> None:
    work.fill_disk()
    work.make_metadata(kind, is_missing=is_missing)
    others: frozenset[Permission] = frozenset((MOVED, OTHER_DISK))
    with pytest.raises(ConstructorError) as caught:
        await work.registry.create("x", work.line(kind), permissions=others)
    check(caught.value, work, kind, is_missing=is_missing)
    await work.registry.create("x", None)
    with pytest.raises(ConstructorError) as caught:
        await work.registry.load("x", work.line(kind))
    check(caught.value, work, kind, is_missing=is_missing)


@KINDS
@STATES
async def test_overwrite_allows_new_metadata_once(
    work: Work, kind: str, is_missing: bool
) -> None:
    work.fill_disk()
    work.make_metadata(kind, is_missing=is_missing)
    allowed: frozenset[Permission] = frozenset((OVERWRITE,))
    await work.registry.create("x", work.line(kind), permissions=allowed)
    await work.registry.remove("x")
    await work.registry.create("x", work.line(kind))  # there is metadata now


@KINDS
@STATES
async def test_blank_disk_needs_no_permission(
    work: Work, kind: str, is_missing: bool
) -> None:
    work.make_metadata(kind, is_missing=is_missing)
    await work.registry.create("x", work.line(kind))


@KINDS
async def test_configuration_file_can_not_allow_it_and_says_what_can(
    work: Work, kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    work.fill_disk()
    config = work.path / "disks.toml"
    config.write_text(f"[device.x]\ntable = '''{work.line(kind)}'''\n")
    devices = ConfiguredDevices(work.registry, read(str(config), TARGET_TYPES))
    caplog.set_level(logging.ERROR)
    await devices.start()
    assert "holds data (byte 12288 is not zero)" in caplog.text
    command = f"load x --overwrite --table '{work.line(kind)}' && nbdtarget resume x"
    assert command in caplog.text
    assert work.is_untouched(is_missing=True)
    allowed: frozenset[Permission] = frozenset((OVERWRITE,))
    await work.registry.load("x", work.line(kind), permissions=allowed)
    await work.registry.resume("x")
    await devices.close()
