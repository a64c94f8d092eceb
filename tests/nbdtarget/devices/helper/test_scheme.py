# SPDX-License-Identifier: Apache-2.0
"""The schemes of helpers: questions about names that start nothing, and programs that are missing."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices import resolve


@pytest.mark.parametrize("scheme", ["qemu", "rbd", "nbdkit", "helper"])
def test_they_say_their_format_and_start_programs(scheme: str) -> None:
    assert resolve.says_format(f"{scheme}:x")
    assert resolve.starts_programs(f"{scheme}:x")
    assert resolve.starts_programs(f"raw:{scheme}:x")
    assert not resolve.starts_programs(f"./{scheme}:x")
    assert not resolve.may_create(f"{scheme}:x")


def test_path_of_an_image_is_that_of_its_file() -> None:
    assert resolve.path_of("qemu:qcow2:/srv/web.qcow2") == "/srv/web.qcow2"
    assert resolve.path_of("qemu:raw:rbd:p/i") is None
    assert resolve.path_of("qemu:nonsense") is None
    assert resolve.path_of("rbd:p/i") is None
    assert resolve.path_of("nbdkit:file?file=/x") is None


def test_identity_never_fails() -> None:
    assert resolve.identity("qemu:nonsense") == "qemu:nonsense"
    assert resolve.identity("qemu:raw:/x") == resolve.identity("qemu:raw:/y/../x")
    assert resolve.absolute_name("qemu:raw:x", "/d") == "qemu:raw:/d/x"
    assert resolve.absolute_name("rbd:i#conf=c", "/d") == "rbd:i#conf=/d/c"
    assert resolve.identity("rbd:i") == resolve.identity("qemu:raw:rbd:rbd/i")
    assert resolve.absolute_name("nbdkit:file?file=x", "/d") == "nbdkit:file?file=/d/x"


async def test_what_is_missing_is_named_with_its_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    for name, package in (("qemu:raw:/x", "qemu-utils"), ("nbdkit:null", "nbdkit")):
        with pytest.raises(ResolveError, match=f"`apt install {package}'"):
            await resolve.open_device(name, read_only=True)


def test_copies_from_an_image_on_the_web_are_as_large_as_from_any_remote_image() -> (
    None
):
    remote = resolve.copy_sizes("https://h/x")
    assert resolve.copy_sizes("qemu:qcow2:https://h/x") == remote
    assert resolve.copy_sizes("qemu:qcow2:/x") == resolve.copy_sizes("qemu:nonsense")
    assert resolve.copy_sizes("qemu:qcow2:/x") != remote


async def test_nothing_is_written_through_a_helper() -> None:
    with pytest.raises(ResolveError, match="can only be read"):
        await resolve.open_device("nbdkit:null", read_only=False)
