# SPDX-License-Identifier: Apache-2.0
"""Names of packed images: what is in them, and which size they need."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.resolve import (
    absolute_name,
    identity,
    is_read_only,
    open_device,
)
from tests.support.packed import PACKERS


def test_identity_and_absolute_name() -> None:
    assert absolute_name("xz:a.xz", "/srv") == "xz:/srv/a.xz"
    assert absolute_name("gzip:a.gz#size=1G", "/srv") == "gzip:/srv/a.gz#size=1G"
    name = "gzip:https://h/a.gz#ca=c.pem&size=1G"
    assert absolute_name(name, "/srv") == "gzip:https://h/a.gz#ca=/srv/c.pem&size=1G"
    assert identity("xz:https://h/a") == identity("xz:https://H:443/a")
    assert identity("xz:/a") != identity("zstd:/a")
    assert is_read_only("xz:/a")


@pytest.mark.parametrize(
    ("format_name", "name", "says"),
    [
        ("gzip", "gzip:{}", "add #size=SIZE. If the image is smaller than 4 GiB, that is #size=5000"),
        ("xz", "xz:{}#size=0", "a disk cannot have 0 bytes"),
        ("xz", "xz:{}#size=big", "big"),
        ("gzip", "xz:{}", "does not tell how large the image in it is"),
        ("gzip", "zstd:{}", "does not tell how large the image in it is"),
    ],
)  # fmt: skip
async def test_refused(tmp_path: Path, format_name: str, name: str, says: str) -> None:
    path = tmp_path / "packed"
    path.write_bytes(PACKERS[format_name](b"x" * 5000))
    with pytest.raises(ResolveError) as caught:
        await open_device(name.format(path), read_only=True)
    assert says in str(caught.value)


async def test_packed_images_are_not_written_to(tmp_path: Path) -> None:
    with pytest.raises(ResolveError, match="can only be read"):
        await open_device(f"xz:{tmp_path}/a")
    with pytest.raises(ResolveError, match="no such file"):
        await open_device(f"xz:{tmp_path}/a", read_only=True)
