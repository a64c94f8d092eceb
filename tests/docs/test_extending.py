# SPDX-License-Identifier: Apache-2.0
"""The worked examples of docs/extending.md do what the page says, with real tables and clients."""

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web

from docs.examples.count import CountTarget
from docs.examples.fifo import Fifo
from docs.examples.http import HttpScheme
from nbdtarget.common.errors import ConstructorError, ResolveError, TableError
from nbdtarget.devices import resolve
from nbdtarget.devices.registry import SCHEMES
from nbdtarget.dm.registry import Registry
from nbdtarget.policies.base import DEMOTE, MISS, MISS_WAKE, PROMOTE, Policy, Work
from nbdtarget.policies.registry import POLICY_TYPES
from nbdtarget.policies.simple import SimplePolicy
from nbdtarget.server.listener import Listener
from nbdtarget.targets.registry import TARGET_TYPES
from nbdtarget_metadata.mode import Mode
from tests.support import cache_liveness
from tests.support.cache import BLOCK, CacheLab
from tests.support.plain_client import PlainClient, PlainClientError

MIB = 1 << 20


# ---- fifo ----


@pytest.fixture
def fifo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(POLICY_TYPES, Fifo.name, Fifo)


def new_fifo(nr_cblocks: int = 2) -> Fifo:
    return Fifo(nr_cblocks, origin_size=64 * BLOCK, block_size=BLOCK, now_ns=0)


def work_of(policy: Policy, *, idle: bool = False) -> tuple[int, int]:
    """Carry out the next migration. Returns its operation and its oblock."""
    work = policy.get_background_work(idle)
    assert work is not None
    policy.complete_background_work(work, True)
    return work.op, work.oblock


def test_a_policy_needs_eight_methods_beside_simple_policy() -> None:
    assert SimplePolicy.__abstractmethods__ == {
        "lookup",
        "set_dirty",
        "clear_dirty",
        "get_background_work",
        "complete_background_work",
        "load_mapping",
        "invalidate",
        "residency",
    }


def test_fifo_demotes_the_oldest_block_that_is_not_pinned() -> None:
    policy = new_fifo()
    for oblock in (5, 6):
        assert policy.lookup(oblock, False) == MISS_WAKE
        assert work_of(policy) == (PROMOTE, oblock)
    policy.pin(policy.lookup(5, False))
    policy.lookup(7, False)
    assert [work_of(policy) for _ in range(2)] == [(DEMOTE, 6), (PROMOTE, 7)]
    assert policy.lookup(5, False) >= 0
    assert policy.lookup(6, False) == MISS_WAKE


def test_fifo_gives_a_block_back_after_a_promotion_that_failed() -> None:
    policy = new_fifo(1)
    policy.lookup(5, False)
    work = policy.get_background_work(False)
    assert work is not None
    assert (policy.residency, policy.lookup(5, False)) == (1, MISS)
    policy.complete_background_work(work, False)
    assert (policy.residency, policy.lookup(5, False)) == (0, MISS_WAKE)


@pytest.mark.parametrize("seed", range(4))
def test_fifo_never_has_a_block_twice_whatever_happens(seed: int) -> None:
    rng = random.Random(seed)
    policy, cached = new_fifo(8), dict[int, int]()
    under_way: list[Work] = []
    for _ in range(4000):
        oblock = rng.randrange(32)
        cblock = policy.lookup(oblock, False)
        assert cached.get(oblock, -1) == max(cblock, -1)
        if cblock >= 0 and rng.random() < 0.3:
            policy.set_dirty(cblock)
        if (work := policy.get_background_work(rng.random() < 0.5)) is not None:
            assert work.oblock not in {each.oblock for each in under_way}
            assert (work.op == PROMOTE) != (work.oblock in cached)
            under_way.append(work)
        while under_way and rng.random() < 0.4:
            work = under_way.pop(rng.randrange(len(under_way)))
            success = rng.random() < 0.8
            policy.complete_background_work(work, success)
            if success and work.op == PROMOTE:
                assert work.cblock not in cached.values()
                cached[work.oblock] = work.cblock
            elif success and work.op == DEMOTE:
                del cached[work.oblock]


@pytest.mark.usefixtures("fifo")
async def test_fifo_serves_a_cache_whose_blocks_come_and_go() -> None:
    lab = CacheLab(nr_cblocks=4, nr_oblocks=32)
    await lab.create("1 writeback fifo 0")
    for oblock in range(6):
        await lab.write(oblock, chr(ord("a") + oblock))
        await lab.warm(oblock)
    assert await lab.used() == 4
    assert lab.cblock(0) is None
    assert lab.cblock(5) is not None
    assert (await lab.status())[-5:] == ["fifo", "0", "rw", "-", ""]
    for oblock in range(6):
        assert await lab.read(oblock) == chr(ord("a") + oblock).encode() * BLOCK
    await lab.remove()


@pytest.mark.usefixtures("fifo")
async def test_fifo_finds_its_blocks_again_after_a_restart() -> None:
    lab = CacheLab(nr_cblocks=4, nr_oblocks=32)
    await lab.create("1 writeback fifo 0")
    for oblock in range(3):
        await lab.warm(oblock)
    await lab.write(1, "x")
    await lab.recreate("1 writeback fifo 0")
    assert await lab.used() == 3
    assert await lab.read(1) == b"x" * BLOCK
    await lab.clean()
    assert lab.on_disk("o", 1) == b"x" * BLOCK
    await lab.remove()


class FifoLife(cache_liveness.Liveness):
    """Random bios, messages, table swaps and failing disks, over a cache with fifo."""

    def _check(self) -> None:
        metadata, policy = self.lab.core, self.lab.target._blocks.policy
        if not isinstance(policy, Fifo) or metadata.mode is not Mode.RW:
            return  # a resume was refused: a table with smq took over, or nothing may change
        for cblock in range(metadata.nr_cblocks):
            oblock = metadata.maybe_oblock(cblock)
            assert oblock is None or policy.lookup(oblock, False) == cblock
        assert not policy._pending, "given to the target, and never completed"
        assert policy.residency == metadata.nr_mapped


@pytest.mark.usefixtures("fifo")
@pytest.mark.parametrize("may_fail", [False, True])
@pytest.mark.parametrize("seed", range(4))
async def test_cache_with_fifo_never_hangs_and_agrees_with_its_metadata(
    seed: int, may_fail: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache_liveness, "POLICIES", (Fifo.name,))
    await FifoLife(seed, may_fail=may_fail).run(nr_rounds=50)


# ---- http ----


@asynccontextmanager
async def web_server(directory: Path) -> AsyncIterator[str]:
    """Serve the files of a directory. Yields the URI of the directory."""
    app = web.Application()
    app.router.add_static("/", directory)
    runner = web.AppRunner(app)
    await runner.setup()
    try:
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@pytest.fixture
def http(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SCHEMES, HttpScheme.name, HttpScheme())


@pytest.mark.usefixtures("http")
async def test_http_stands_behind_a_linear_table(tmp_path: Path) -> None:
    content = random.Random(1).randbytes(MIB)
    (tmp_path / "disk.img").write_bytes(content)
    registry = Registry(resolve)
    async with web_server(tmp_path) as site:
        table = f"0 2040 linear {site}/disk.img 8"
        device = await registry.create("web", table, read_only=True)
        pieces = [(0, 512), (4096, 65536), (2040 * 512 - 1024, 1024)]
        read = [device.read(offset, length) for offset, length in pieces]
        for (offset, length), data in zip(
            pieces, await asyncio.gather(*read), strict=True
        ):
            assert data == content[4096 + offset :][:length]
        (target,) = device.table()
        assert target[3] == f"{site}/disk.img 8"
        await registry.close()


@pytest.mark.usefixtures("http")
async def test_http_refuses_what_it_cannot_serve(tmp_path: Path) -> None:
    registry = Registry(resolve)
    async with web_server(tmp_path) as site:
        with pytest.raises(ConstructorError, match="Not Found"):
            await registry.create("web", f"0 8 linear {site}/none 0", read_only=True)
        with pytest.raises(ConstructorError, match="can only be read"):
            await registry.create("web", f"0 8 linear {site}/none 0")
    await registry.close()


@pytest.mark.usefixtures("http")
async def test_http_scheme_is_in_the_list_that_errors_print() -> None:
    with pytest.raises(ResolveError, match=r"http://HOST\[:PORT\]/PATH"):
        await resolve.open_device("gopher://x/y")


# ---- count ----


@pytest.fixture
async def counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Registry, Path]]:
    """A disk with a `count` table, called c, and the socket that it is served at."""
    monkeypatch.setitem(TARGET_TYPES, CountTarget.type_name, CountTarget)
    (tmp_path / "disk").write_bytes(bytes(MIB))
    registry = Registry(resolve)
    await registry.create("c", f"0 2040 count {tmp_path}/disk 8")
    listener = Listener(registry)
    await listener.start(f"unix:{tmp_path}/s")
    yield registry, tmp_path / "s"
    await listener.close()
    await registry.close()


async def test_count_counts_what_a_client_asks_for(
    counted: tuple[Registry, Path], tmp_path: Path
) -> None:
    registry, socket = counted

    def talk() -> None:
        with PlainClient(socket, "c") as client:
            client.write(1024, b"w" * 512)
            client.flush()
            assert client.read(1024, 512) == b"w" * 512
            assert client.read(0, 512) == bytes(512)
            with pytest.raises(PlainClientError):
                client.read(2040 * 512, 512)  # behind the end: refused before the table

    await asyncio.to_thread(talk)
    device = registry.get("c")
    assert (await device.status())[0][3] == "2 1 1 0"
    assert (tmp_path / "disk").read_bytes()[4096 + 1024 :][:512] == b"w" * 512
    assert await device.message(0, ["reset"]) is None
    assert (await device.status())[0][3] == "0 0 0 0"


async def test_count_refuses_other_messages_and_words(
    counted: tuple[Registry, Path],
) -> None:
    registry, _ = counted
    with pytest.raises(TableError, match="Invalid argument"):
        await registry.get("c").message(0, ["forget"])
    for words in ("", "/dev/null", "/dev/null x", "/dev/null 0 0"):
        with pytest.raises(ConstructorError, match="count: "):
            await registry.create("d", f"0 8 count {words}")
