# SPDX-License-Identifier: Apache-2.0
"""The state of an image distinguishes it from another image, and from later states of itself."""

import os
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper import state as module
from nbdtarget.devices.helper.rbd_info import RbdState
from nbdtarget.devices.helper.rbd_name import RbdImage
from nbdtarget.devices.helper.state import ImageState, look_at_image
from nbdtarget.devices.helper.words import parse_nbdkit, parse_qemu, parse_rbd_name


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
    os.utime(path, ns=(first.mtime_ns, first.mtime_ns))
    # Another file, of the same size and time.
    assert "place is" in first.difference(await look_at_image(words))
    path.unlink()
    with pytest.raises(ResolveError, match="No such file"):
        await look_at_image(words)


async def test_what_is_not_known_differs_from_nothing() -> None:
    state = await look_at_image(parse_nbdkit("nbdkit:null"))
    assert state == ImageState()
    assert state.difference(ImageState((("size", "1"),))) == ""
    assert ImageState((("size", "1"),)).difference(state) == ""


@pytest.mark.parametrize(
    ("found", "ids", "is_pinned"),
    [
        (RbdState("100f", "4"), ("image-id=100f", "snapshot-id=4"), True),
        (RbdState("100f", mtime_ns=7), ("image-id=100f",), False),
    ],
    ids=["snapshot", "image"],
)
async def test_image_of_ceph_has_ids(
    monkeypatch: pytest.MonkeyPatch,
    found: RbdState,
    ids: tuple[str, ...],
    is_pinned: bool,
) -> None:
    now = [found]

    async def look(name: str, image: RbdImage) -> RbdState:
        assert (name, image) == ("rbd:p/i", RbdImage("p", "", "i", ""))
        return now[0]

    monkeypatch.setattr(module, "look_at_rbd", look)
    words = parse_rbd_name("rbd:p/i")
    first = await look_at_image(words)
    assert (first.ids, first.is_pinned) == (ids, is_pinned)
    assert first.mtime_ns == found.mtime_ns
    for other, reason in (
        (found._replace(image_id="2"), "image-id is 2, not 100f"),
        (found._replace(mtime_ns=9), "time of last modification is 9"),
    ):
        now[0] = other
        assert reason in first.difference(await look_at_image(words))
