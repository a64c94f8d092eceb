# SPDX-License-Identifier: Apache-2.0
"""A remote image whose name says its format is the disk in it; nothing else is taken for one."""

import pytest

from nbdtarget.devices.helper.words import parse_qemu
from nbdtarget.porcelain.disk_name import disk_name


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("https://h/debian-12.qcow2", "qemu:qcow2:https://h/debian-12.qcow2"),
        ("HTTP://h/A.QCOW2", "qemu:qcow2:HTTP://h/A.QCOW2"),
        ("s3://b/k.vmdk", "qemu:vmdk:s3://b/k.vmdk"),
        (
            "https://h/50%25.qcow2?s=1&t=2",
            "qemu:qcow2:https://h/50%2525.qcow2?s=1%26t=2",
        ),
        ("az://c/k.vhd", "qemu:vpc:az://c/k.vhd"),
        ("gs://b/k.vhdx#pin=size", "qemu:vhdx:gs://b/k.vhdx%23pin=size"),
        ("https://h/x.vdi#ca=c.pem", "qemu:vdi:https://h/x.vdi%23ca=/d/c.pem"),
    ],
)
def test_name_that_says_a_format(given: str, name: str) -> None:
    assert disk_name(given, "/d") == name
    assert parse_qemu(name).container


@pytest.mark.parametrize(
    "given",
    [
        "https://h/debian-12.raw",
        "https://h/image.qcow2.xz",
        "https://h/?file=x.qcow2",
        "https://h/x#y.qcow2",
        "raw:https://h/x.qcow2",
        "qemu:qcow2:https://h/x.qcow2",
        "nbd://h/x.qcow2",
        "/srv/x.qcow2",  # what lies here may come from a guest
    ],
)
def test_name_that_says_none(given: str) -> None:
    assert disk_name(given, "/d") == given


def test_relative_path() -> None:
    assert disk_name("x.qcow2", "/d") == "/d/x.qcow2"
