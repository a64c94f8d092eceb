# SPDX-License-Identifier: Apache-2.0
"""The main job from end to end, on a file system image behind a slow server."""

import shutil
from pathlib import Path

import pytest

from tests.support.clients import MIB, CloneUnderTest, client, needs
from tests.support.processes import nbdkit_file
from tests.support.sample_disk import make_sample_source

pytestmark = [
    pytest.mark.interop,
    needs("nbdkit", "nbdcopy", "qemu-io", "e2fsck", "mkfs.ext4"),
]

SIZE = 32 * MIB
PATTERN = b"\x77" * 4096


@pytest.mark.slow
def test_file_system_is_cloned_across_a_kill(tmp_path: Path) -> None:
    image = tmp_path / "source.img"
    make_sample_source(image, size=SIZE)
    content = image.read_bytes()
    path = tmp_path / "source.sock"
    slowly = ["--readonly", "--filter=delay"]
    with nbdkit_file(
        image, path, tmp_path / "nbdkit.log", *slowly, settings=["rdelay=20ms"]
    ):
        clone = CloneUnderTest(tmp_path, content, f"nbd+unix:///?socket={path}")
        process = clone.start()
        write = [
            word for at in (0, 9, 20, 31) for word in ("-c", f"write -P 0x77 {at}M 4k")
        ]
        client("qemu-io", "--format=raw", *write, "-c", "flush", clone.uri)
        process.kill()
        written = bytearray(content)
        for at in (0, 9, 20, 31):
            written[at * MIB : at * MIB + 4096] = PATTERN
        with clone.serve():
            # While it hydrates, and after a kill: the whole disk, with what was flushed.
            client("nbdcopy", clone.uri, str(tmp_path / "copy.img"))
        assert (tmp_path / "copy.img").read_bytes() == written
        clone.hydrate()
    # Nothing but the destination is left now.
    assert clone.dest.read_bytes() == written
    assert image.read_bytes() == content


def test_hydrated_destination_is_a_sound_file_system(tmp_path: Path) -> None:
    image = tmp_path / "source.img"
    make_sample_source(image, size=SIZE)
    clone = CloneUnderTest(tmp_path, image.read_bytes(), str(image))
    clone.hydrate()
    image.unlink()
    client(shutil.which("e2fsck") or "e2fsck", "-f", "-n", str(clone.dest))
    # The holes of the source are holes still, not zeroes that were written out.
    assert clone.dest.stat().st_blocks * 512 < SIZE // 2
