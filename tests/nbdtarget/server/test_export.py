# SPDX-License-Identifier: Apache-2.0
"""The transmission flags that an export promises on the wire."""

import pytest

from nbdtarget.server.export import DirectoryExports, transmission_flags
from nbdtarget_protocol import consts as c
from tests.support.peer import Directory, Disk

ALWAYS = c.FLAG_SEND_FLUSH | c.FLAG_SEND_FUA | c.FLAG_CAN_MULTI_CONN | c.FLAG_SEND_CACHE


def test_flags_of_a_plain_device() -> None:
    disk = Disk()
    disk.can_discard = False
    assert transmission_flags(disk) == ALWAYS | c.FLAG_SEND_WRITE_ZEROES


def test_flags_of_an_able_device() -> None:
    disk = Disk()
    disk.can_fast_zero = True
    assert transmission_flags(disk) == (
        ALWAYS | c.FLAG_SEND_WRITE_ZEROES | c.FLAG_SEND_TRIM | c.FLAG_SEND_FAST_ZERO
    )


def test_flags_of_a_read_only_device() -> None:
    assert transmission_flags(Disk(read_only=True)) == ALWAYS | c.FLAG_READ_ONLY


@pytest.mark.parametrize("read_only", [False, True])
def test_clients_are_told_whether_the_disk_below_is_rotational(read_only: bool) -> None:
    disk = Disk(read_only=read_only)
    assert not transmission_flags(disk) & c.FLAG_ROTATIONAL
    disk.rotational = True
    assert transmission_flags(disk) & c.FLAG_ROTATIONAL


@pytest.mark.parametrize("name", ["", "disk"])
def test_lookup(name: str) -> None:
    info = DirectoryExports(Directory({"disk": Disk(4096)})).lookup(name)
    assert info is not None
    assert (info.name, info.size, info.description) == ("disk", 4096, "about disk")


def test_no_default_export_among_two() -> None:
    exports = DirectoryExports(Directory({"a": Disk(), "b": Disk()}))
    assert exports.lookup("") is None
    assert exports.lookup("c") is None
    assert [name for name, _ in exports.names()] == ["a", "b"]


@pytest.mark.parametrize(
    ("payload_max", "advertised"), [(64 << 10, 64 << 10), (64 << 20, 32 << 20)]
)
def test_no_more_payload_is_advertised_than_is_taken(
    payload_max: int, advertised: int
) -> None:
    exports = DirectoryExports(Directory({"disk": Disk()}), payload_max=payload_max)
    info = exports.lookup("disk")
    assert info is not None
    assert info.payload_max == advertised
