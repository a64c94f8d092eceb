# SPDX-License-Identifier: Apache-2.0
"""QEMU's block layer as the client: qemu-img and qemu-io."""

from pathlib import Path

import pytest

from tests.support.clients import (
    MIB,
    NAME,
    CloneUnderTest,
    client,
    needs,
    report,
    serving,
)
from tests.support.processes import ServerProcess

pytestmark = [pytest.mark.interop, needs("qemu-img", "qemu-io")]


def qemu_io(uri: str, *commands: str) -> None:
    """Run commands; a pattern that does not match, or an I/O error, fails the test."""
    words = [word for command in commands for word in ("-c", command)]
    said = client("qemu-io", "--format", "raw", *words, uri)
    assert "failed" not in said


def test_qemu_img_info_and_map(shared: CloneUnderTest) -> None:
    info = report("qemu-img", "info", "--output=json", "-f", "raw", shared.uri)
    assert info["virtual-size"] == len(shared.content)
    extents = report("qemu-img", "map", "--output=json", "-f", "raw", shared.uri)
    assert sum(extent["length"] for extent in extents) == len(shared.content)
    for extent in extents:
        if extent["zero"]:
            assert not any(shared.content[extent["start"] :][: extent["length"]])


def test_qemu_img_maps_what_is_hydrated(
    clone: CloneUnderTest, served_unhydrated: ServerProcess
) -> None:
    # QEMU reads a foreign context as it reads base:allocation: 0 is "data", 1 is not.
    qemu_io(clone.uri, "write 64k 128k")
    image = f"driver=nbd,server.type=unix,server.path={clone.socket},export={NAME}"
    image += ",x-dirty-bitmap=x-nbdtarget:hydration"
    extents = report("qemu-img", "map", "--output=json", "--image-opts", image)
    assert [(e["start"], e["length"], e["data"]) for e in extents] == [
        (0, 64 << 10, False),
        (64 << 10, 128 << 10, True),
        (192 << 10, len(clone.content) - (192 << 10), False),
    ]


@needs("nbdkit", "qemu-nbd")
@pytest.mark.parametrize(
    "kind",
    [
        "file",
        pytest.param("nbdkit", marks=pytest.mark.long),
        pytest.param("qemu-nbd", marks=pytest.mark.long),
    ],
)
def test_maps_are_true_over_a_half_hydrated_clone(
    clone: CloneUnderTest, source_image: Path, tmp_path: Path, kind: str
) -> None:
    # Whether the source is a file or another server with block status of its own.
    with serving(kind, source_image, tmp_path) as source:
        clone.source = source
        with clone.serve("--no-hydration"):
            qemu_io(clone.uri, "write -z -u 512k 512k", "write -P 7 2560k 64k")
            extents = report("qemu-img", "map", "--output=json", "-f", "raw", clone.uri)
    expected = bytearray(clone.content)
    expected[512 << 10 : 1 << 20] = bytes(512 << 10)
    expected[2560 << 10 : 2624 << 10] = b"\7" * (64 << 10)
    zero = [(e["start"], e["start"] + e["length"]) for e in extents if e["zero"]]
    assert not any(any(expected[begin:end]) for begin, end in zero)
    for known in ((512 << 10, 1 << 20), (2 << 20, 2560 << 10), (2624 << 10, 4 << 20)):
        assert any(begin <= known[0] and known[1] <= end for begin, end in zero), zero


def test_qemu_img_compares_equal_to_the_source(
    shared: CloneUnderTest,
) -> None:
    raw = ["-f", "raw", "-F", "raw"]
    # -U shares the image: our server locks the source against writers, and qemu-img would do so, too.
    said = client("qemu-img", "compare", "-U", *raw, shared.uri, shared.source)
    assert "identical" in said


def test_qemu_img_converts_out_and_in(clone: CloneUnderTest, tmp_path: Path) -> None:
    qcow2 = tmp_path / "copy.qcow2"
    with clone.serve():
        client("qemu-img", "convert", "-f", "raw", "-O", "qcow2", clone.uri, str(qcow2))
        client("qemu-img", "convert", "-n", "-O", "raw", str(qcow2), clone.uri)
        client("qemu-img", "compare", "-F", "raw", str(qcow2), clone.uri)
    clone.hydrate()
    assert clone.dest.read_bytes() == clone.content


def test_qemu_io_reads_back_what_it_wrote(
    clone: CloneUnderTest, served_unhydrated: ServerProcess
) -> None:
    qemu_io(
        clone.uri,
        "write -P 0x11 4k 4k",
        "write -P 0x22 60k 200k",  # over three region borders
        "write -f -P 0x33 1M 512",  # FUA
        "flush",
        "read -P 0x11 4k 4k",
        "read -P 0x22 60k 200k",
        "read -P 0x33 1M 512",
    )


def test_qemu_io_zeroes_and_discards(clone: CloneUnderTest) -> None:
    with clone.serve("--no-hydration"):
        qemu_io(
            clone.uri,
            "write -P 0x44 6M 1M",
            "write -z 6300k 100k",
            "write -z -u 6500k 64k",
            "discard 7M 512k",
            "flush",
            "read -P 0 6300k 100k",
            "read -P 0 6500k 64k",
            "read -P 0x44 6M 100k",
        )
    clone.hydrate()
    dest = clone.dest.read_bytes()
    assert dest[: 6 * MIB] == clone.content[: 6 * MIB]
    assert not any(dest[6300 * 1024 : 6400 * 1024])
    assert dest[6 * MIB : 6300 * 1024] == b"\x44" * (6300 * 1024 - 6 * MIB)


@pytest.mark.long
def test_written_data_is_there_after_a_restart(clone: CloneUnderTest) -> None:
    with clone.serve("--no-hydration"):
        qemu_io(clone.uri, "write -P 0x55 3M 100k", "flush")
    with clone.serve():
        qemu_io(clone.uri, "read -P 0x55 3M 100k")
    clone.hydrate()
    with clone.serve():
        qemu_io(clone.uri, "read -P 0x55 3M 100k")
