# SPDX-License-Identifier: Apache-2.0
"""Archives of tar that nbdkit's filters would serve with wrong bytes."""

import subprocess
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices import resolve
from nbdtarget.devices.helper.nbdkit_filters import refuse_wrong_filters
from nbdtarget.devices.helper.words import parse_nbdkit
from tests.support.clients import needs

SIZE = 1 << 20


def archive(folder: Path, *options: str) -> str:
    """Make an archive with a disk that has a hole, and a file before and behind it; return the name of the disk in it."""
    for name in ("before", "behind"):
        (folder / name).write_bytes(b"x" * 2 * SIZE)
    with (folder / "disk.img").open("wb") as disk:
        disk.write(b"d" * 4096)
        disk.truncate(SIZE)
    argv = ["tar", *options, "-cf", "a.tar", "before", "disk.img", "behind"]
    subprocess.run(argv, cwd=folder, check=True)
    return f"nbdkit:file?file={folder}/a.tar&filter=tar&tar-entry=disk.img"


@pytest.mark.parametrize("format_", ["gnu", "posix"])
async def test_sparse_member_of_an_archive_is_refused(
    tmp_path: Path, format_: str
) -> None:
    name = archive(tmp_path, f"--format={format_}", "--sparse")
    with pytest.raises(ResolveError, match="has stored disk") as caught:
        await refuse_wrong_filters(parse_nbdkit(name))
    assert f"`tar -xf {tmp_path}/a.tar disk.img' unpacks it" in str(caught.value)


@needs("nbdkit")
@pytest.mark.parametrize("is_sparse", [False, True], ids=["plain", "sparse"])
async def test_disk_in_an_archive_is_right_or_refused(
    tmp_path: Path, is_sparse: bool
) -> None:
    name = archive(tmp_path, *(["--sparse"] if is_sparse else []))
    if is_sparse:
        with pytest.raises(ResolveError, match="sparse"):
            await resolve.open_device(name, read_only=True)
        return
    disk = await resolve.open_device(name, read_only=True)
    try:
        data = await disk.read(0, SIZE)
        assert data.tobytes() == (tmp_path / "disk.img").read_bytes()
    finally:
        await disk.close()


async def test_what_cannot_be_looked_at_is_left_to_nbdkit(tmp_path: Path) -> None:
    name = archive(tmp_path)
    for change in (
        ("a.tar", "missing.tar"),
        ("tar-entry=disk.img", "tar-entry=no"),
        ("a.tar", "disk.img"),
    ):
        await refuse_wrong_filters(parse_nbdkit(name.replace(*change)))


async def test_gzip_is_warned_of(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    await refuse_wrong_filters(parse_nbdkit(f"nbdkit:file?file={tmp_path}/a&filter=xz"))
    assert not caplog.text
    await refuse_wrong_filters(
        parse_nbdkit(f"nbdkit:file?file={tmp_path}/a.gz&filter=gzip")
    )
    assert "only the first member" in caplog.text
