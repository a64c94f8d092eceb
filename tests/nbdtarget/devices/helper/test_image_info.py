# SPDX-License-Identifier: Apache-2.0
"""Images that name other files are refused before they are opened, unless their name allows it."""

import subprocess
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.image_info import references, refuse_references
from nbdtarget.devices.helper.words import parse_qemu
from tests.support.clients import needs


def qemu_img(*argv: str, cwd: Path) -> None:
    subprocess.run(["qemu-img", *argv], cwd=cwd, check=True, capture_output=True)


@pytest.mark.parametrize(
    ("info", "found"),
    [
        ({}, []),
        ({"format-specific": {"type": "qcow2", "data": {"compat": "1.1"}}}, []),
        (
            {"backing-filename": "b", "full-backing-filename": "/b"},
            ["the backing file b"],
        ),
        ({"format-specific": {"data": {"data-file": "d"}}}, ["the data file d"]),
        ({"format-specific": {"data": {"extents": [{"filename": "/i"}]}}}, []),
        (
            {"format-specific": {"data": {"extents": [{"filename": "/e"}, {}]}}},
            ["the extent /e", "the extent None"],
        ),
        ({"format-specific": {"data": {"extents": ["?"]}}}, ["the extent ?"]),
        ({"format-specific": ["?"]}, []),
    ],
    ids=["none", "qcow2", "backing", "data", "own", "extents", "odd", "no-data"],
)
def test_references(info: dict[str, object], found: list[str]) -> None:
    assert list(references(info, "/i")) == found


@needs("qemu-img")
@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("qcow2:backed", "the backing file base"),
        ("qcow2:with-data", "the data file data.raw"),
        ("vmdk:flat.vmdk", "flat-flat.vmdk"),
        ("qed:backed.qed", "the backing file base"),
        ("qcow2:base", None),
        ("vmdk:stream.vmdk", None),
        ("vmdk:sparse.vmdk", None),
        ("vhdx:image.vhdx", None),
        ("raw:base", None),
    ],
)
async def test_images_that_refer_to_others_are_refused(
    tmp_path: Path, name: str, reference: str | None
) -> None:
    make_images(tmp_path)
    format_, file = name.split(":")
    name = f"qemu:{format_}:{tmp_path}/{file}"
    if reference is None:
        await refuse_references(parse_qemu(name))
        return
    with pytest.raises(ResolveError) as caught:
        await refuse_references(parse_qemu(name))
    told = str(caught.value)
    assert told.startswith(f"{name}: the image refers to ")
    assert reference in told
    assert f"write {name}#allow=references" in told
    assert "\n" not in told
    await refuse_references(parse_qemu(f"{name}#allow=references"))


def make_images(work: Path) -> None:
    def create(format_: str, *words: str) -> None:
        qemu_img("create", "-q", "-f", format_, *words, cwd=work)

    create("qcow2", "base", "1M")
    create("qcow2", "-b", "base", "-F", "qcow2", "backed")
    create("qed", "-b", "base", "-F", "qcow2", "backed.qed")
    create("qcow2", "-o", "data_file=data.raw", "with-data", "1M")
    create("vmdk", "-o", "subformat=monolithicFlat", "flat.vmdk", "1M")
    create("vmdk", "-o", "subformat=streamOptimized", "stream.vmdk", "1M")
    create("vmdk", "sparse.vmdk", "1M")
    create("vhdx", "image.vhdx", "1M")


@needs("qemu-img")
async def test_image_that_is_not_in_the_format_is_refused_in_one_line(
    tmp_path: Path,
) -> None:
    (tmp_path / "x").write_bytes(b"nothing of the kind" * 100)
    for name, reason in (("x", "not in qcow2 format"), ("no", "No such file")):
        with pytest.raises(ResolveError, match=reason) as caught:
            await refuse_references(parse_qemu(f"qemu:qcow2:{tmp_path}/{name}"))
        assert "\n" not in str(caught.value)


async def test_program_that_is_missing_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ResolveError, match="`apt install qemu-utils'"):
        await refuse_references(parse_qemu("qemu:qcow2:/x"))
