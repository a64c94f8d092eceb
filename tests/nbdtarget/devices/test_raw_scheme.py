# SPDX-License-Identifier: Apache-2.0
"""Names of the form raw:DISK: the same disk, under a name that says its format."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices import resolve
from nbdtarget.devices.file.device import FileDevice


async def test_it_is_the_same_disk_as_without_the_word(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    for name in (str(path), f"direct:{path}"):
        assert resolve.identity(f"raw:{name}") == resolve.identity(str(path))
        assert resolve.path_of(f"raw:{name}") == str(path)
    assert resolve.absolute_name("raw:disk", "/a/b") == "raw:/a/b/disk"
    assert resolve.may_create(f"raw:{tmp_path}/new")
    assert not resolve.may_create(f"raw:{path}")
    assert resolve.says_format(f"raw:{path}")
    assert not resolve.says_format(str(path))


async def test_device_knows_itself_by_its_path(tmp_path: Path) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    device = await resolve.open_device(f"raw:{path}", read_only=False)
    assert isinstance(device, FileDevice)
    assert device.name == f"raw:{path}"
    evidence = await device.identify("source")
    assert evidence.name == str(path)
    # A device that takes its place, for example because it is latched, knows its path, too.
    again = await device.reopened(f"raw:{path}", read_only=False)
    assert again is not None
    assert (await again.identify("source")).name == str(path)
    await again.close()
    await device.close()


async def test_it_is_created_and_removed(tmp_path: Path) -> None:
    name = f"raw:{tmp_path}/new"
    device = await resolve.create_device(name, 4096)
    assert device.name == name
    await device.close()
    assert (tmp_path / "new").read_bytes() == bytes(4096)
    await resolve.remove_created(name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("raw:", "a device needs a name"),
        ("raw:raw:/x", "raw: is not supported"),
        ("raw:ftp://x/y", "ftp: is not supported"),
    ],
)
async def test_refusal_names_the_reason(name: str, reason: str) -> None:
    with pytest.raises(ResolveError, match=reason):
        await resolve.open_device(name)
    # Questions that may not fail are answered all the same.
    resolve.identity(name)
    resolve.absolute_name(name, "/a")
    resolve.path_of(name)
    assert not resolve.may_create(name)
