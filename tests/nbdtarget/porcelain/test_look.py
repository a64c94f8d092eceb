# SPDX-License-Identifier: Apache-2.0
"""A plan looks at the disks: sizes are rounded with a note, formats are warned about, names are checked."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.porcelain import look


@pytest.mark.parametrize(
    ("offset", "magic", "what"),
    [
        (0, b"QFI\xfb\0\0\0\3", "a qcow2 image"),
        (64, b"\x7f\x10\xda\xbe", "a vdi image"),
        (1, b"QFI\xfb", ""),
    ],
    ids=["qcow2", "vdi", "raw"],
)
async def test_export_of_an_image_is_warned_about(
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    offset: int,
    magic: bytes,
    what: str,
) -> None:
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(offset) + magic + bytes(4096 - offset - len(magic)))
    await look.warn_of_image(str(path), read_only=True)
    if what:
        assert f"{path}: begins like {what}, and is served as a raw disk" in caplog.text
        assert f"raw:{path}" in caplog.text
    else:
        assert not caplog.text
    caplog.clear()
    await look.warn_of_image(f"raw:{path}", read_only=True)
    assert not caplog.text


async def test_size_is_rounded_only_where_nothing_is_written(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "odd"
    path.write_bytes(bytes(1000))
    assert await look.disk_size(str(path), read_only=True) == 1024
    assert f"{path}: its size, 1000 bytes" in caplog.text
    with pytest.raises(ResolveError, match="not a multiple of 512"):
        await look.disk_size(str(path), read_only=False)


@pytest.mark.parametrize("read_only", [False, True])
async def test_image_of_an_odd_size_is_refused_as_an_image(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, read_only: bool
) -> None:
    path = tmp_path / "image"
    path.write_bytes(b"QFI\xfb\0\0\0\3" + bytes(1000))
    with pytest.raises(ResolveError, match="begins like a qcow2 image") as caught:
        await look.disk_size(str(path), read_only=read_only)
    assert f"raw:{path}" in str(caught.value)
    assert not caplog.text


@pytest.mark.parametrize("word", ["", "raw:", "direct:", "raw:direct:"])
def test_names_go_by_the_path(word: str) -> None:
    disk = f"{word}/srv/web.img"
    assert look.metadata_name(None, disk, "/") == "/srv/web.img.nbdtarget"
    assert look.export_name(None, disk, "disk") == "web"
    with pytest.raises(ResolveError, match="/no/such does not exist"):
        look.check_directory(f"{word}/no/such/disk")
    with pytest.raises(ResolveError, match="is a device"):
        look.metadata_name(None, f"{word}/dev/sdx", "/")


def test_disk_that_is_no_file_needs_a_place_for_its_metadata() -> None:
    with pytest.raises(ResolveError, match="--metadata FILE"):
        look.metadata_name(None, "nbd://host/disk", "/")
    assert look.export_name(None, "nbd://host/disk", "clone") == "clone"
