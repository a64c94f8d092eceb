# SPDX-License-Identifier: Apache-2.0
"""scripts/bench_cache*.py: what they say of figures, and that the cache they measure is what they claim."""

from pathlib import Path

import pytest

from nbdtarget.targets.metadata_io import run_file
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import PolicyIdentity as PolicyIdentity
from scripts import bench_cache, bench_cache_hits, bench_cache_idle
from scripts import bench_cache_migrations as migrations
from scripts.bench_rounds import Sample, best_peer, paired_ratio
from scripts.cache_under_test import (
    KIB,
    MIB,
    CacheUnderTest,
    Counters,
    make_full_metadata,
    make_sparse,
)
from tests.support.plain_client import PlainClient

BLOCK_SIZE = 64 * KIB


def sample(iops: float, *, cpu_us: float = 5.0) -> Sample:
    return Sample(iops, iops / 256, 100.0, cpu_us)


@pytest.fixture
def cache(tmp_path: Path) -> CacheUnderTest:
    """Of 16 blocks, for an origin of 64."""
    origin = tmp_path / "origin.img"
    make_sparse(origin, 64 * BLOCK_SIZE)
    cache = CacheUnderTest(
        tmp_path, str(origin), 64 * BLOCK_SIZE, block_size=BLOCK_SIZE
    )
    cache.make_device(16 * BLOCK_SIZE)
    return cache


def test_only_selects_parts() -> None:
    assert bench_cache.selected([]) == list(bench_cache.PARTS)
    assert bench_cache.selected(["cache", "linear"]) == list(bench_cache.PARTS)
    assert bench_cache.selected(["cache-idle", "cache-hits"]) == [
        "cache-hits",
        "cache-idle",
    ]
    assert bench_cache.selected(["randread"]) == []


def test_ratio_is_the_median_of_the_rounds_own() -> None:
    ours, theirs = [sample(n) for n in (10, 90, 20)], [sample(n) for n in (5, 10, 20)]
    assert paired_ratio(ours, theirs) == 2.0


def test_best_peer_is_a_plain_server() -> None:
    servers = {"nbdkit": [sample(10)], "qemu-nbd": [sample(20)], "cache": [sample(90)]}
    assert best_peer(servers) == "qemu-nbd"
    assert best_peer({"cache": [sample(90)]}) is None


@pytest.mark.parametrize(("other", "verdict"), [(40, "reached"), (60, "NOT reached")])
def test_twice_the_other_caches_is_wanted(other: int, verdict: str) -> None:
    servers = {"nbdkit-cache": [sample(other)], "cache": [sample(100)]}
    (line,) = bench_cache_hits.verdicts(bench_cache_hits.summarize({"job": servers}))
    assert line.startswith("job: ")
    assert line.endswith(f": {verdict}")


def test_plain_servers_are_compared_as_the_clone_is() -> None:
    servers = {name: [sample(n)] for name, n in (("nbdkit", 50), ("clone", 60))}
    servers["cache"] = [sample(100)]
    summary = bench_cache_hits.summarize({"job": servers})["job"]
    assert summary["clone_to_best_plain"] == 1.2
    assert summary["servers"]["nbdkit"]["cache_to_it"] == 2.0


def test_cost_of_a_hit_is_compared_with_that_of_the_system_calls() -> None:
    servers = {"floor": [sample(50, cpu_us=10)], "cache": [sample(100, cpu_us=12)]}
    (line,) = bench_cache_hits.verdicts(bench_cache_hits.summarize({"job": servers}))
    assert line == "job: 1.20 of the floor's CPU"


def test_named_servers_are_measured_beside_the_cache() -> None:
    wanted = [
        n for n in bench_cache_hits.SERVERS if bench_cache_hits.is_wanted(n, ["floor"])
    ]
    assert wanted == ["floor", "cache"]
    assert all(bench_cache_hits.is_wanted(n, []) for n in bench_cache_hits.SERVERS)


def test_migrations_are_compared_round_by_round() -> None:
    def at(p99_us: float) -> migrations.Sample:
        return migrations.Sample(1, p99_us, 1, 1, 0, 0)

    ours, theirs = [at(30), at(22), at(44)], [at(10), at(20), at(40)]
    assert migrations.paired_ratio(ours, theirs, "p99_us") == 1.1


def test_hit_ratio_is_of_what_came_between() -> None:
    before = {"read_hits": 5, "read_misses": 100, "write_hits": 0, "write_misses": 7}
    after = {"read_hits": 8, "read_misses": 101, "write_hits": 3, "write_misses": 8}
    counted = Counters(before, after)
    assert (counted.total, counted.hits, counted.hit_ratio) == (8, 6, 0.75)
    assert Counters(after, after).hit_ratio == 0.0


def test_full_metadata_has_every_block_mapped_clean_and_shut_down(
    tmp_path: Path,
) -> None:
    path = tmp_path / "meta"
    make_full_metadata(
        path, block_size=BLOCK_SIZE, origin_size=40_000 * BLOCK_SIZE, nr_cblocks=10_000
    )
    opened = run_file(
        path,
        CacheMetadata.open(device_size=path.stat().st_size, block_size=BLOCK_SIZE),
        read_only=True,
    )
    assert opened.clean_when_opened
    assert (opened.nr_mapped, opened.nr_dirty) == (10_000, 0)
    identity = PolicyIdentity("smq", (2, 0, 0), 4)
    oblocks = [mapping.oblock for mapping in opened.mappings(identity)]
    assert oblocks == list(range(0, 40_000, 4))


def test_cache_is_warm_and_clean_when_it_is_said_to_be(cache: CacheUnderTest) -> None:
    with cache.serving(), PlainClient(cache.socket, cache.export) as client:
        cache.warm(0, 16)
        fresh = cache.status()
        for block in range(16):
            client.write(block * BLOCK_SIZE, b"x" * 4096)
        client.read(20 * BLOCK_SIZE, 4096)
        counted = Counters(fresh, cache.status())
        assert (counted.write_hits, counted.read_misses, counted.total) == (16, 1, 17)
        assert cache.number("dirty_blocks") == 16
        cache.clean()
        assert cache.number("dirty_blocks") == 0
        client.disconnect()
    assert Path(cache.origin).read_bytes().count(b"x" * 4096) == 16


def test_books_of_a_process_show_what_it_did(cache: CacheUnderTest) -> None:
    devices = [cache.device, Path(cache.origin)]
    with cache.serving() as process, PlainClient(cache.socket, cache.export) as client:
        before = bench_cache_idle.look(process.pid, devices)
        client.write(0, bytes(4096))
        after = bench_cache_idle.look(process.pid, devices)
        client.disconnect()
    assert after.write_calls > before.write_calls
    assert after.modified_ns > before.modified_ns
    assert after.cpu_ns > before.cpu_ns


def test_migrated_bytes_are_counted_without_the_clients(cache: CacheUnderTest) -> None:
    with cache.serving() as process:
        before = migrations.written_bytes(process.pid)
        cache.warm(0, 16)
        copied = migrations.written_bytes(process.pid) - before
    assert 16 * BLOCK_SIZE <= copied < 16 * BLOCK_SIZE + MIB
