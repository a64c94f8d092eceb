# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget cache`: what is refused before anything is changed, and how the job goes."""

import asyncio
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.porcelain.cache import (
    CacheJob,
    CacheOptions,
    CachePlan,
    CacheStatus,
    plan_cache,
)
from nbdtarget.targets import metadata_io
from nbdtarget_metadata.cache.metadata import CacheMetadata
from tests.support.patience import PATIENCE_S

KIB = 1 << 10
MIB = 1 << 20
BLOCK = 64 * KIB
CONTENT = os.urandom(2 * MIB)


class Recorder:
    """A reporter that remembers, and ends the job at a given call."""

    def __init__(self, stop_when: str = "status") -> None:
        self.calls: list[str] = []
        self.statuses: list[CacheStatus] = []
        self.told: dict[str, object] = {}
        self.uris: list[str] = []
        self._stop_when = stop_when
        self._is_stopped = False

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        self.uris = uris
        self._called("serving")

    def given_up(self, nr_blocks: int) -> None:
        self._called("given_up", nr_blocks)

    def unclean(self, nr_dirty: int, nr_bytes: int) -> None:
        self._called("unclean", (nr_dirty, nr_bytes))

    def status(self, status: CacheStatus) -> None:
        self.statuses.append(status)
        if self._stop_when == "status":
            self._stop()

    def uncached(self) -> None:
        self._called("uncached")

    def failed(self, line: str) -> None:
        self._called("failed", line)

    def stopping(self) -> None:
        self._called("stopping")

    def stopped(self, nr_dirty: int, nr_bytes: int) -> None:
        self._called("stopped", (nr_dirty, nr_bytes))

    def not_clean(self, reason: str) -> None:
        self._called("not_clean", reason)

    def _called(self, name: str, what: object = None) -> None:
        self.calls.append(name)
        self.told[name] = what
        if name == self._stop_when:
            self._stop()

    def _stop(self) -> None:
        if not self._is_stopped:  # a second signal would have its usual effect
            self._is_stopped = True
            os.kill(os.getpid(), signal.SIGTERM)


@pytest.fixture
def work(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    (work / "slow.img").write_bytes(CONTENT)
    monkeypatch.chdir(work)
    return work


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.iterdir()}


def options_of(**changes: Any) -> CacheOptions:
    words: dict[str, Any] = {"origin": "slow.img", "cache": "fast"}
    return CacheOptions(**{**words, **changes})


async def cache(recorder: Recorder | None = None, **changes: object) -> int:
    return await CacheJob(options_of(**changes), recorder or Recorder()).run()


async def make_metadata(
    path: str,
    *,
    origin_size: int = 2 * MIB,
    nr_cblocks: int = 16,
    block_size: int = BLOCK,
    mapped: int = 0,
    dirty: int = 0,
    is_clean: bool = True,
    dirty_log: bool = False,
    writes_back: bool = True,
) -> None:
    """Metadata of a cache of which the first `mapped` blocks are in use."""
    size = CacheMetadata.device_size_for(nr_cblocks)
    device = await resolve.create_device(path, size)
    metadata = await metadata_io.run(
        device,
        CacheMetadata.format(
            device_size=size,
            block_size=block_size,
            origin_size=origin_size,
            nr_cblocks=nr_cblocks,
            uuid=bytes(16),
        ),
    )
    await metadata_io.run(
        device, metadata.start(dirty_log=dirty_log, writes_back=writes_back)
    )
    await commit(metadata, device)
    for cblock in range(mapped):
        metadata.insert(cblock, cblock, dirty=cblock < dirty)
    await commit(metadata, device)
    if is_clean:
        metadata.prepare_shutdown()
        await commit(metadata, device, clean_shutdown=True)
    await device.close()


async def commit(
    metadata: CacheMetadata, device: Device, *, clean_shutdown: bool = False
) -> None:
    transaction = metadata.pre_commit(clean_shutdown=clean_shutdown)
    if transaction is None:
        return
    await metadata_io.run(device, transaction.journal())
    await metadata_io.run(device, transaction.superblock())
    transaction.done()


# ---- what is made, and what is left ----


async def test_everything_is_made_and_served(work: Path, runtime: Path) -> None:
    recorder = Recorder()
    assert await cache(recorder, cache_size=MIB) == 0
    assert recorder.calls == ["serving", "stopping", "stopped"]
    assert recorder.told["stopped"] == (0, 0)
    assert recorder.statuses[0] == CacheStatus(
        used_blocks=0,
        total_blocks=16,
        dirty_blocks=0,
        dirty_bytes=0,
        hit_ratio=None,
        promotions=0,
        demotions=0,
    )
    assert files(work).keys() == {"slow.img", "fast", "fast.nbdtarget"}
    assert (work / "fast").stat().st_size == MIB
    assert (work / "slow.img").read_bytes() == CONTENT
    assert list((runtime / "nbdtarget").iterdir()) == []


@pytest.mark.parametrize("mode", ["writethrough", "writeback", "passthrough"])
async def test_same_command_continues(work: Path, mode: str) -> None:
    for _ in range(2):
        assert await cache(cache_size=MIB, mode=mode) == 0


async def test_same_command_continues_without_the_size(work: Path) -> None:
    assert await cache(cache_size=MIB) == 0
    assert await cache() == 0


async def test_cache_in_memory_needs_no_file(work: Path) -> None:
    assert await cache(cache="memory:1M") == 0
    assert files(work).keys() == {"slow.img"}


async def test_dirty_blocks_at_the_end_are_reported(work: Path) -> None:
    await make_metadata("fast.nbdtarget", mapped=5, dirty=3)
    (work / "fast").write_bytes(bytes(MIB))
    recorder = Recorder()
    # The threshold keeps idle writeback from starting.
    assert await cache(recorder, mode="writeback", migration_threshold=1) == 0
    assert recorder.calls == ["serving", "stopping", "stopped"]
    assert recorder.told["stopped"] == (3, 3 * BLOCK)


@pytest.mark.parametrize(
    ("dirty_log", "told"), [(False, (5, 5 * BLOCK)), (True, (3, 3 * BLOCK))]
)
async def test_unclean_stop_is_reported(
    work: Path, dirty_log: bool, told: tuple[int, int]
) -> None:
    await make_metadata(
        "fast.nbdtarget", mapped=5, dirty=3, is_clean=False, dirty_log=dirty_log
    )
    (work / "fast").write_bytes(bytes(MIB))
    recorder = Recorder()
    assert await cache(recorder, mode="writeback", migration_threshold=1) == 0
    assert recorder.calls == ["serving", "unclean", "stopping", "stopped"]
    assert recorder.told["unclean"] == told


@pytest.mark.parametrize("mode", ["writethrough", "writeback", "passthrough"])
async def test_crash_in_writethrough_is_reported_and_leaves_nothing_dirty(
    work: Path, mode: str
) -> None:
    await make_metadata("fast.nbdtarget", mapped=5, is_clean=False, writes_back=False)
    (work / "fast").write_bytes(bytes(MIB))
    recorder = Recorder()
    assert await cache(recorder, mode=mode, migration_threshold=1) == 0
    assert recorder.calls == ["serving", "given_up", "stopping", "stopped"]
    assert recorder.told["given_up"] == 5
    assert recorder.told["stopped"] == (0, 0)


@pytest.mark.parametrize(
    ("known", "reason"),
    [
        ({"is_clean": False}, "after unclean shutdown: 0 blocks"),
        ({"mapped": 5, "is_clean": False}, "after unclean shutdown: 5 blocks"),
        ({"mapped": 5, "dirty": 3}, "unless all blocks are clean: 3 blocks"),
        (
            {"mapped": 5, "dirty": 3, "dirty_log": True, "is_clean": False},
            "unless all blocks are clean: 3 blocks",
        ),
    ],
)
async def test_passthrough_over_dirty_blocks_is_refused_with_advice(
    work: Path, known: dict[str, Any], reason: str
) -> None:
    await make_metadata("fast.nbdtarget", **known)
    (work / "fast").write_bytes(bytes(MIB))
    before = files(work)
    recorder = Recorder()
    with pytest.raises(NbdTargetError) as caught:
        await cache(recorder, mode="passthrough")
    assert reason in str(caught.value)
    assert recorder.calls == []
    assert files(work) == before

    # The advice in the error works.
    assert await cache(Helping(), policy="cleaner") == 0
    assert await cache(recorder, mode="passthrough") == 0


class Helping(Recorder):
    """Stops when nothing is dirty."""

    def __init__(self) -> None:
        super().__init__(stop_when="")

    def status(self, status: CacheStatus) -> None:
        super().status(status)
        if not status.dirty_blocks:
            self._stop()


async def test_passthrough_that_only_the_target_refuses_is_refused_before_clients_connect(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await make_metadata("fast.nbdtarget", mapped=5, is_clean=False)
    (work / "fast").write_bytes(bytes(MIB))
    before = files(work)
    recorder = Recorder()
    monkeypatch.setattr(
        "nbdtarget.porcelain.cache._check_may_pass_through", lambda *_: None
    )
    with pytest.raises(NbdTargetError, match="after unclean shutdown"):
        await cache(recorder, mode="passthrough")
    assert recorder.calls == []
    assert files(work) == before


async def test_paths_with_blanks(work: Path) -> None:
    (work / "my disk.img").write_bytes(CONTENT)
    assert await cache(origin="my disk.img", cache="my\\ cache", cache_size=MIB) == 0
    assert (work / "my\\ cache").stat().st_size == MIB


async def test_overwrite_starts_anew(work: Path) -> None:
    (work / "fast").write_bytes(b"x" * MIB)
    assert await cache(overwrite=True) == 0
    assert (work / "slow.img").read_bytes() == CONTENT


async def test_cache_that_is_missing_is_made_anew_if_nothing_was_cached(
    work: Path,
) -> None:
    await make_metadata("fast.nbdtarget")
    assert await cache(cache_size=MIB) == 0
    assert (work / "fast").stat().st_size == MIB


async def test_resized_origin_is_accepted_with_resize(work: Path) -> None:
    assert await cache(cache_size=MIB) == 0
    with (work / "slow.img").open("ab") as origin:
        origin.write(bytes(MIB))
    with pytest.raises(NbdTargetError, match="origin has 2097152 bytes, not 3145728"):
        await cache()
    assert await cache(resize=True) == 0
    assert await cache() == 0


async def test_resized_cache_is_accepted_with_resize(work: Path) -> None:
    assert await cache(cache_size=MIB) == 0
    os.truncate(work / "fast", 2 * MIB)
    with pytest.raises(NbdTargetError, match="cache has 16 blocks, not 32"):
        await cache()
    recorder = Recorder()
    assert await cache(recorder, resize=True) == 0
    assert recorder.statuses[0].total_blocks == 32
    assert await cache() == 0


# ---- what is refused ----


@pytest.mark.parametrize(
    ("made", "changes", "reason"),
    [
        ({}, {"origin": "nowhere"}, "nowhere"),
        ({}, {"origin": "."}, "work"),
        ({"odd": b"x" * 1000}, {"origin": "odd"}, "not a multiple of 512"),
        ({"empty": b""}, {"origin": "empty"}, "empty"),
        ({}, {}, "--cache-size"),
        ({}, {"cache_size": 1000}, "not a multiple of 512"),
        ({}, {"cache_size": 32 * KIB}, "too small for one block"),
        ({"fast": bytes(32 * KIB)}, {}, "too small for one block"),
        (
            {"fast": bytes(MIB)},
            {"cache_size": 2 * MIB},
            "not the 2097152 of --cache-size",
        ),
        ({}, {"cache": "no/such/cache", "cache_size": MIB}, "no/such/cache"),
        ({}, {"cache": "slow.img"}, "is both"),
        ({}, {"cache_size": MIB, "metadata": "slow.img"}, "is both"),
        ({"fast": bytes(MIB)}, {"metadata": "fast"}, "is both"),
        ({}, {"cache_size": MIB, "metadata": "fast"}, "is both"),
        ({}, {"cache_size": MIB, "metadata": "no/such"}, "no/such"),
        ({}, {"cache_size": MIB, "policy": "lru"}, "'lru'"),
        ({"fast": b"x" * MIB}, {}, "holds data"),
        ({"fast": bytes(MIB - 1) + b"x"}, {}, "holds data"),
        ({"fast": bytes(MIB), "fast.nbdtarget": b"x" * MIB}, {}, "fast.nbdtarget"),
        ({"fast.nbdtarget": b"x" * MIB}, {"cache_size": MIB}, "fast.nbdtarget"),
        ({"fast": bytes(MIB), "fast.nbdtarget": bytes(512)}, {}, "metadata"),
        (
            {},
            {"cache": "memory:1M", "mode": "writeback"},
            "is lost when the server ends",
        ),
        ({}, {"origin": "memory:2M", "cache_size": MIB}, "it cannot be an origin"),
        (
            {},
            {"cache_size": MIB, "metadata": "memory:4M", "mode": "writeback"},
            "is lost when the server ends",
        ),
        ({}, {"cache": "/dev/nosuch"}, "--cache-size"),
        ({}, {"cache": "ftp://x/y", "metadata": "m"}, "ftp"),
        ({}, {"cache_size": MIB, "listen": ("nonsense",)}, "nonsense"),
        ({}, {"cache_size": MIB, "listen": ("unix:slow.img",)}, "not a socket"),
        ({}, {"cache_size": MIB, "name": "a/b"}, "a/b"),
    ],
)
async def test_refusal_changes_nothing(
    work: Path, made: dict[str, bytes], changes: dict[str, Any], reason: str
) -> None:
    for name, content in made.items():
        (work / name).write_bytes(content)
    before = files(work)
    with pytest.raises(NbdTargetError) as caught:
        await cache(**changes)
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(work) == before


@pytest.mark.parametrize(
    ("known", "changes", "reason"),
    [
        ({"mapped": 5, "dirty": 3}, {}, "up to 3 blocks"),
        ({"mapped": 5, "dirty": 3, "is_clean": False}, {}, "up to 5 blocks"),
        (
            {"mapped": 5, "dirty": 3, "is_clean": False, "dirty_log": True},
            {},
            "up to 3 blocks",
        ),
        ({"mapped": 5}, {}, "remove the metadata"),
        (
            {"mapped": 5, "dirty": 3},
            {"cache": "memory:1M"},
            "the cache memory:1M, which is missing",
        ),
        ({"block_size": 96 * KIB}, {}, "give --block-size 96K"),
        ({"origin_size": 4 * MIB}, {}, "origin has 4194304 bytes, not 2097152"),
        ({"nr_cblocks": 32}, {}, "cache has 32 blocks, not 16"),
    ],
)
async def test_metadata_of_another_cache_is_refused(
    work: Path, known: dict[str, Any], changes: dict[str, Any], reason: str
) -> None:
    await make_metadata("fast.nbdtarget", **known)
    before = files(work)
    if "cache" not in changes:
        changes = {**changes, "cache_size": MIB}
    with pytest.raises(NbdTargetError) as caught:
        await cache(metadata="fast.nbdtarget", **changes)
    assert reason in str(caught.value)
    assert files(work) == before


async def test_metadata_of_a_clone_is_refused(work: Path) -> None:
    from tests.support.porcelain_clone import clone

    (work / "source").write_bytes(CONTENT)
    assert await clone(dest="fast") == 0
    before = files(work)
    with pytest.raises(NbdTargetError, match=r"fast\.nbdtarget.*clone"):
        await cache()
    assert files(work) == before


async def test_origin_in_use_is_refused(work: Path) -> None:
    before = files(work)
    reader = await resolve.open_device(str(work / "slow.img"), read_only=True)
    try:
        with pytest.raises(NbdTargetError, match=r"slow\.img"):
            await cache(cache_size=MIB)
    finally:
        await reader.close()
    assert files(work) == before


async def test_new_files_are_removed_when_the_address_is_taken(work: Path) -> None:
    before = files(work)
    with pytest.raises(NbdTargetError, match=r"slow\.img"):
        await cache(cache_size=MIB, listen=("unix:ok.sock", "unix:slow.img"))
    assert files(work) == before


# ---- the plan ----


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "128 1 writethrough smq 2 migration_threshold 2048"),
        (
            {"mode": "writeback"},
            "128 2 writeback dirty_log smq 2 migration_threshold 2048",
        ),
        (
            {"mode": "writeback", "dirty_log": False, "policy": "cleaner"},
            "128 1 writeback cleaner 2 migration_threshold 2048",
        ),
        (
            {"dirty_log": True, "sorted_writeback": True, "policy": "mq"},
            "128 3 writethrough dirty_log sorted_writeback mq 2 migration_threshold 2048",
        ),
        (
            {"block_size": 512 * KIB},
            "1024 1 writethrough smq 2 migration_threshold 8192",
        ),
        (
            {"migration_rate": 5 * MIB, "migration_threshold": 4 * MIB + 1},
            "128 1 writethrough smq 4 migration_threshold 8193 migration_rate 5242880",
        ),
    ],
)
async def test_table_line_says_what_was_asked_for(
    work: Path, changes: dict[str, object], words: str
) -> None:
    before = files(work)
    plan = await plan_cache(options_of(cache_size=MIB, **changes), str(work))
    disks = f"{work}/fast.nbdtarget {work}/fast {work}/slow.img"
    assert plan.table == f"0 4096 cache {disks} {words}"
    assert (plan.name, plan.size) == ("slow", 2 * MIB)
    assert plan.missing == (f"{work}/fast", MIB)
    assert plan.was_clean
    assert files(work) == before


# ---- while it is served ----


async def test_metadata_that_cannot_be_written_any_more_is_reported(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "nbdtarget.targets.cache.target.CacheTarget.status_fields",
        lambda self: {"mode": "ro"},
    )
    recorder = Recorder(stop_when="failed")
    assert await cache(recorder, cache_size=MIB) == 1
    assert recorder.calls == ["serving", "failed", "stopping", "stopped"]


async def test_unclean_end_is_reported(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nothing(self: object) -> None:
        """The full sync is left out."""

    monkeypatch.setattr(
        "nbdtarget.targets.cache.target.CacheTarget._record_stop", nothing
    )
    recorder = Recorder()
    assert await cache(recorder, cache_size=MIB) == 1
    assert recorder.calls == ["serving", "stopping", "not_clean"]
    assert "fast.nbdtarget" in str(recorder.told["not_clean"])


class UnreadRecorder(Recorder):
    """One whose reader has gone away."""

    def serving(self, plan: CachePlan, uris: list[str]) -> None:
        raise BrokenPipeError

    def status(self, status: CacheStatus) -> None:
        super().status(status)
        raise BrokenPipeError


async def test_disk_is_served_when_the_output_is_not_read(work: Path) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await cache(UnreadRecorder(), cache_size=MIB) == 0
    assert files(work).keys() == {"slow.img", "fast", "fast.nbdtarget"}


@pytest.mark.parametrize("is_waited_for", [True, False])
async def test_linear_on_the_origin_is_reported_once(
    work: Path, is_waited_for: bool
) -> None:
    recorder = Recorder(stop_when="uncached" if is_waited_for else "")
    job = CacheJob(options_of(cache_size=MIB), recorder)
    running = asyncio.create_task(job.run())
    while "serving" not in recorder.calls:
        await sleep(0.01)
    registry = job._daemon.registry
    await registry.load("slow", f"0 4096 linear {work}/slow.img 0")
    await registry.resume("slow")
    if not is_waited_for:
        (work / "fast.nbdtarget").unlink()  # it is not used any more
        os.kill(os.getpid(), signal.SIGTERM)
    assert await running == 0
    assert recorder.calls == ["serving", "uncached", "stopping"]
