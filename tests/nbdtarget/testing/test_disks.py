# SPDX-License-Identifier: Apache-2.0
"""Disks that fail and are slow when told to, and keep what was written."""

import errno as errnos
from collections.abc import Iterator

import pytest

from nbdtarget.api.blocking import BlockingServer
from nbdtarget.api.nbd_client import NbdClient, NbdError
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.testing.disks import FlakyDisk, SlowDisk

OLD, NEW = b"o" * 512, b"n" * 512


@pytest.fixture
def server() -> Iterator[BlockingServer]:
    with BlockingServer() as server:
        yield server


@pytest.fixture
def flaky(server: BlockingServer) -> FlakyDisk:
    return FlakyDisk(server.create("f", size="1M"))


@pytest.fixture
def client(flaky: FlakyDisk) -> Iterator[NbdClient]:
    with flaky.connect() as client:
        client.write(0, OLD)
        yield client


def fails(client: NbdClient, *, reads: bool) -> bool:
    try:
        if reads:
            client.read(0, 512)
        else:
            client.write(512, NEW)
    except NbdError as error:
        return error.errno == errnos.EIO
    return False


@pytest.mark.parametrize(
    ("reads", "writes"), [(True, True), (True, False), (False, True)]
)
def test_disk_fails_as_told_until_it_is_healed(
    flaky: FlakyDisk, client: NbdClient, *, reads: bool, writes: bool
) -> None:
    flaky.fail(reads=reads, writes=writes)
    assert (fails(client, reads=True), fails(client, reads=False)) == (reads, writes)
    flaky.heal()
    assert client.read(0, 512) == OLD
    assert not fails(client, reads=False)


def test_lying_disk_drops_writes(flaky: FlakyDisk, client: NbdClient) -> None:
    flaky.fail(drop_writes=True)
    client.write(0, NEW)
    client.flush()
    flaky.heal()
    assert client.read(0, 512) == OLD


def test_to_fail_nothing_is_refused(flaky: FlakyDisk) -> None:
    with pytest.raises(NbdTargetError, match="say what is to fail"):
        flaky.fail(reads=False, writes=False)


def test_slow_disk_says_how_slow_it_is_and_keeps_what_was_written(
    server: BlockingServer,
) -> None:
    slow = SlowDisk(server.create("s", size="1M"))
    with slow.connect() as client:
        client.write(0, OLD)
        slow.set_delay(1, write_ms=2)
        below = "memory:1048576 0"
        assert slow.table() == f"0 2048 delay {below} 1 {below} 2 {below} 2"
        assert client.read(0, 512) == OLD
        slow.set_delay(0)
        assert client.read(0, 512) == OLD
    for wrong in (-1, 10**9):
        with pytest.raises(NbdTargetError, match="a delay must be from 0"):
            slow.set_delay(wrong)
