# SPDX-License-Identifier: Apache-2.0
"""Whether a file that is open could be opened once more by its path."""

import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.file.again import maybe_refusal
from nbdtarget.devices.resolve import open_device


async def test_a_disk_whose_size_is_rounded_is_asked_below(tmp_path: Path) -> None:
    path = tmp_path / "odd"
    path.write_bytes(b"x" * 700)
    for name in (str(path), f"raw:{path}"):
        device = await open_device(name, read_only=True)
        await device.check_again()
        path.rename(tmp_path / "moved")
        with pytest.raises(ResolveError, match="No such file or directory: the file"):
            await device.check_again()
        (tmp_path / "moved").rename(path)
        await device.close()


@pytest.mark.parametrize("read_only", [False, True])
def test_what_may_not_be_opened_any_more_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, read_only: bool
) -> None:
    """Root may open anything, so the system's answer is put in."""

    def may(path: str, mode: int, *, effective_ids: bool) -> bool:
        return not mode & os.W_OK

    path = tmp_path / "d"
    path.write_bytes(bytes(512))
    monkeypatch.setattr(os, "access", may)
    fd = os.open(path, os.O_RDONLY)
    try:
        refusal = maybe_refusal("d", str(path), fd, read_only=read_only)
    finally:
        os.close(fd)
    if read_only:
        assert refusal is None
    else:
        assert "may not be opened again" in str(refusal)
