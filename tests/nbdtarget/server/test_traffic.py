# SPDX-License-Identifier: Apache-2.0
"""Each request is counted once, and the counters are the same with the compiled fast path and without it."""

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from nbdtarget.server import reception
from nbdtarget.server.traffic import (
    BOUNDS_NS,
    OPERATIONS,
    Account,
    Accounts,
    Traffic,
    sum_of,
)
from nbdtarget_protocol import consts as c
from tests.support.dm import RamDevice
from tests.support.patience import until
from tests.support.peer import Peer
from tests.support.site import SIZE, TABLES, Site, force_misses, linear

WAYS = ("compiled", "ring", "python")
Totals = dict[str, tuple[int, int, int]]


@pytest.fixture(params=WAYS)
async def site(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Site]:
    if request.param == "python":
        monkeypatch.setattr(reception, "IS_COMPILED", False)
    elif not compiled.IS_COMPILED:
        pytest.skip(compiled.describe())
    if request.param == "ring":
        force_misses(monkeypatch)
    made = Site(tmp_path)
    yield made
    await made.close()


def counted(traffic: Traffic | Account | None) -> Totals:
    """By operation: requests, bytes, failed ones. The buckets and the time must fit them."""
    assert traffic is not None
    found = {}
    assert set(traffic.counts()) <= set(OPERATIONS)
    for command, counts in traffic.counts().items():
        name = OPERATIONS[command]
        nr, nr_bytes, taken_ns, nr_failed, *buckets = counts
        assert sum(buckets) == nr
        least = sum(nr * low for nr, low in zip(buckets, (0, *BOUNDS_NS), strict=True))
        assert taken_ns >= least
        assert (taken_ns > 0) is (nr > 0)
        if nr or nr_failed:
            found[name] = nr, nr_bytes, nr_failed
    return found


@pytest.mark.parametrize("table", ["linear", "cache", "clone"])
async def test_each_request_counts_once(site: Site, table: str) -> None:
    text = TABLES[table](site, random.Random(1).randbytes(SIZE))
    device = await site.registry.create("d", text)
    peer = await site.attach("d")
    batch = [peer.request(c.CMD_READ, at * 4096, 4096) for at in range(8)]
    batch += [
        peer.request(c.CMD_WRITE, at * 8192, payload=b"x" * 8192) for at in range(5)
    ]
    batch.append(peer.request(c.CMD_WRITE, 0, payload=b"y" * 512, flags=c.CMD_FLAG_FUA))
    batch.append(peer.request(c.CMD_FLUSH))
    peer.writer.write(b"".join(batch))
    assert [(await peer.reply()).error for _ in batch] == [0] * len(batch)
    await peer.ask(c.CMD_READ, 0, 1 << 20)
    await peer.ask(c.CMD_WRITE, 0, payload=bytes(100_000))
    await peer.ask(c.CMD_WRITE_ZEROES, 0, 65536)
    await peer.ask(c.CMD_TRIM, 65536, 65536)
    assert (await peer.ask(c.CMD_READ, SIZE, 512)).error == c.EINVAL
    assert (await peer.ask(c.CMD_WRITE, SIZE, payload=b"z" * 512)).error != 0
    assert (await peer.ask(77, 0, 512)).error == c.EINVAL  # NBD has no such command

    expected = {
        "read": (9, 8 * 4096 + (1 << 20), 1),
        "write": (7, 5 * 8192 + 512 + 100_000, 1),
        "flush": (1, 0, 0),
        "write_zeroes": (1, 65536, 0),
        "discard": (1, 65536, 0),
    }
    assert site.listener is not None
    accounts = site.listener.accounts
    assert counted(accounts.of(device)) == expected
    assert counted(accounts.all) == expected
    (client,) = site.listener.clients()
    assert client.device is device
    assert counted(client.traffic) == expected

    # The numbers stay when the connection has ended.
    await until_gone(site, peer)
    assert site.listener.clients() == []
    assert counted(accounts.of(device)) == expected


async def until_gone(site: Site, peer: Peer) -> None:
    """Close the client's half, and wait until the server has released everything of it."""
    assert site.listener is not None
    peer.writer.write(peer.request(c.CMD_DISC))
    assert await peer.at_end()
    listener = site.listener
    await until(lambda: not listener.nr_connections)


async def test_failed_requests_count_as_such(tmp_path: Path) -> None:
    site = Site(tmp_path)
    device = await site.registry.create("d", f"0 {SIZE // 512} error")
    peer = await site.attach("d")
    assert (await peer.ask(c.CMD_READ, 0, 4096)).error == c.EIO
    assert (await peer.ask(c.CMD_WRITE, 0, payload=bytes(4096))).error == c.EIO
    assert site.listener is not None
    found = counted(site.listener.accounts.of(device))
    assert found == {"read": (1, 0, 1), "write": (1, 0, 1)}
    await site.close()


async def test_a_removed_device_is_forgotten_but_for_the_sum(tmp_path: Path) -> None:
    site = Site(tmp_path)
    device = await site.registry.create("d", linear(site, bytes(SIZE)))
    peer = await site.attach("d")
    await peer.ask(c.CMD_READ, 0, 4096)
    assert site.listener is not None
    accounts = site.listener.accounts
    await until_gone(site, peer)
    assert counted(accounts.of(device))["read"] == (1, 4096, 0)
    await site.registry.remove("d")
    del device
    assert counted(accounts.all)["read"] == (1, 4096, 0)
    await site.close()


def test_two_devices_have_numbers_of_their_own() -> None:
    accounts = Accounts()
    a, b = RamDevice("a", 8192), RamDevice("b", 8192)
    assert accounts.of(a) is None
    first, second = accounts.open(a), accounts.open(a)
    other = accounts.open(b)
    first.note(c.CMD_READ, 2, 1024, 30_000)
    second.note(c.CMD_READ, 1, 512, 10**10)
    other.note(c.CMD_FLUSH, 1, 0, 25_000)
    accounts.close(a, second)
    total = accounts.of(a)
    assert total is not None
    reads = [3, 1536, 2 * 30_000 + 10**10, 0, 0, 2, *[0] * 10, 1]
    assert total.counts() == {c.CMD_READ: reads}
    # A time that is equal to a bound is not above it.
    flushes = [1, 0, 25_000, 0, 1, *[0] * 12]
    assert accounts.all.counts() == {c.CMD_READ: reads, c.CMD_FLUSH: flushes}


def test_a_connection_that_ends_while_parts_are_added_counts_once() -> None:
    accounts = Accounts()
    device = RamDevice("a", 8192)
    first, second = accounts.open(device), accounts.open(device)
    first.note(c.CMD_READ, 2, 1024, 30_000)
    second.note(c.CMD_READ, 1, 512, 30_000)
    accounts.close(device, first)
    parts = accounts.all.parts()
    accounts.close(device, second)
    read = sum_of(part.counts() for part in parts)[c.CMD_READ]
    assert read == accounts.all.counts()[c.CMD_READ]
    assert read[:2] == [3, 1536]


@pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())
def test_the_compiled_path_has_the_same_buckets() -> None:
    import nbdtarget_fast

    assert nbdtarget_fast.BOUNDS_NS == BOUNDS_NS
