# SPDX-License-Identifier: Apache-2.0
"""What tells an image from another one, or from a later state of it."""

import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.state import ImageState, look_at_image
from nbdtarget.devices.helper.words import parse_nbdkit, parse_qemu


@pytest.mark.parametrize("name", ["qemu:raw:{}", "nbdkit:file?file={}"])
async def test_file_that_was_replaced_or_written_to(tmp_path: Path, name: str) -> None:
    path = tmp_path / "a"
    path.write_bytes(b"one")
    parse = parse_qemu if name.startswith("qemu") else parse_nbdkit
    words = parse(name.format(path))
    first = await look_at_image(words)
    assert first.mtime_ns == path.stat().st_mtime_ns
    assert not first.is_pinned
    assert first.difference(await look_at_image(words)) == ""
    os.utime(path, ns=(1, 5))
    assert "time of last modification is 5 ns" in first.difference(
        await look_at_image(words)
    )
    path.write_bytes(b"longer")
    assert "size is 6, not 3" in first.difference(await look_at_image(words))
    other = tmp_path / "b"
    other.write_bytes(b"one")
    other.rename(path)
    assert "place is" in first.difference(await look_at_image(words))
    path.unlink()
    with pytest.raises(ResolveError, match="No such file"):
        await look_at_image(words)


async def test_what_is_not_known_differs_from_nothing() -> None:
    state = await look_at_image(parse_nbdkit("nbdkit:null"))
    assert state == ImageState()
    assert state.difference(ImageState((("size", "1"),))) == ""
    assert ImageState((("size", "1"),)).difference(state) == ""
