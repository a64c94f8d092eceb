# SPDX-License-Identifier: Apache-2.0
"""scripts/hit_ratio.py: that its yardsticks are right, and what it says of smq."""

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from nbdtarget.policies.base import PROMOTE
from scripts.hit_ratio import (
    Trace,
    TraceError,
    belady_hits,
    fio_zipf,
    generate,
    lru_hits,
    main,
    parser,
    policy_run,
    read_trace,
    zipf,
)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("writes", ["0", "0.3"])
def test_smq_is_at_least_as_good_as_lru_once_warm(writes: str) -> None:
    options = parser().parse_args(["--cache-blocks", "1024", "--writes", writes])
    options.origin_blocks = 8 * 1024
    options.warm_up, options.accesses = 120_000, 50_000
    options.iops = 1024 // 60
    trace = generate("zipf", options)
    run = policy_run(trace, 1024, options)
    assert run.hits >= lru_hits(trace, 1024, options.warm_up)
    assert run.hits <= belady_hits(trace, 1024, options.warm_up)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("iops", [100, 10_000])
def test_smq_is_at_least_as_good_as_lru_for_what_fio_reads(iops: int) -> None:
    # Periods end by time and by use.
    arguments = ["--cache-blocks", "1024", "--writes", "0", "--seed", "7"]
    options = parser().parse_args([*arguments, "--iops", str(iops)])
    options.origin_blocks = 8 * 1024
    options.warm_up, options.accesses = 250_000, 50_000
    trace = generate("fio", options)
    run = policy_run(trace, 1024, options)
    assert run.hits >= lru_hits(trace, 1024, options.warm_up)
    assert run.hits <= belady_hits(trace, 1024, options.warm_up)


@pytest.mark.long
def test_smq_keeps_up_with_lru_when_other_blocks_become_hot() -> None:
    options = parser().parse_args(["--cache-blocks", "256", "--writes", "0.3"])
    options.origin_blocks, options.iops = 8 * 256, 256 // 60
    options.warm_up, options.accesses = 30_000, 30_000
    trace = generate("shift", options)
    run = policy_run(trace, 256, options)
    assert run.hits >= lru_hits(trace, 256, options.warm_up)


# ---- beside LRU: small caches, the shapes of `make hit-ratio` ----

CBLOCKS = 128
ORIGIN_BLOCKS = 8 * CBLOCKS
NOISE = 0.01  # of the accesses. A drift costs some misses each time that the policy tries to be choosy again


def zipf_blocks(rng: random.Random, _: int) -> Iterator[int]:
    return zipf(rng, ORIGIN_BLOCKS, 1.1)


def changed(rng: random.Random, nr: int) -> Iterator[int]:
    """Other blocks become hot after three quarters: in the middle of what is counted."""
    before, after = zipf(rng, ORIGIN_BLOCKS, 1.1), zipf(rng, ORIGIN_BLOCKS, 1.1)
    for n in range(nr):
        yield next(before if n < nr * 3 // 4 else after)


def drifting(rng: random.Random, nr: int) -> Iterator[int]:
    """All hot blocks move on by one, again and again: only what is recent is worth caching."""
    blocks = zipf(rng, ORIGIN_BLOCKS, 1.1)
    for n in range(nr):
        yield (next(blocks) + n // 50) % ORIGIN_BLOCKS


def scanned(rng: random.Random, nr: int) -> Iterator[int]:
    """A hot set that fits, and from time to time a scan of everything between its accesses."""
    hot = rng.sample(range(ORIGIN_BLOCKS), CBLOCKS * 3 // 4)
    for n in range(nr):
        is_scan = n % 2 and n // ORIGIN_BLOCKS % 4 > 1
        yield n // 2 % ORIGIN_BLOCKS if is_scan else rng.choice(hot)


def loop(_: random.Random, nr: int) -> Iterator[int]:
    """A loop that is a tenth longer than the cache: LRU never hits."""
    return (n % (CBLOCKS * 11 // 10) for n in range(nr))


# Periods end by time, and by use. With writes, most of what is cached is dirty.
@pytest.mark.parametrize(
    ("iops", "writes"),
    [pytest.param(20, 0.3, marks=pytest.mark.long), (10_000, 0.0)],
)
@pytest.mark.parametrize(
    "shape", [zipf_blocks, changed, drifting, scanned, loop], ids=lambda f: f.__name__
)
def test_no_fewer_hits_than_lru(
    shape: Callable[[random.Random, int], Iterator[int]], iops: int, writes: float
) -> None:
    nr = 20_000
    rng = random.Random(1)
    options = parser().parse_args(["--iops", str(iops)])
    options.warm_up = nr // 2
    blocks = array("Q", itertools.islice(shape(rng, nr), nr))
    trace = Trace(
        ORIGIN_BLOCKS, blocks, bytearray(rng.random() < writes for _ in range(nr))
    )
    run = policy_run(trace, CBLOCKS, options)
    counted = nr - options.warm_up
    lru = lru_hits(trace, CBLOCKS, options.warm_up)
    assert run.hits >= lru - NOISE * counted
    # LRU promotes each miss. What is ahead of it does not.
    if run.hits > lru + 0.02 * counted:
        assert run.migrations[PROMOTE] < (counted - lru) / 4


# ---- where accesses come from ----


def test_fio_zipf_gives_ranks_their_shares_and_places() -> None:
    nr, draws = 1 << 12, 200_000
    requests = list(itertools.islice(fio_zipf(random.Random(4), nr, 1.1), draws))
    counts = Counter(requests)
    hottest = [request for request, _ in counts.most_common(4)]
    steps = {(b - a) % nr for a, b in itertools.pairwise(hottest)}
    assert steps == {0x61C8864680B583EB % nr}
    zeta = sum(rank**-1.1 for rank in range(1, nr + 1))
    for rank, request in enumerate(hottest[:2], 1):
        share = rank**-1.1 / zeta
        assert counts[request] / draws == pytest.approx(share, rel=0.05)
    assert min(requests) >= 0
    assert max(requests) < nr


@pytest.mark.parametrize("name", ["fio", "zipf", "uniform", "scan", "shift"])
def test_generators_give_what_the_seed_says(name: str) -> None:
    options = parser().parse_args(["--seed", "3"])
    options.origin_blocks, options.warm_up, options.accesses = 100, 50, 50
    trace = generate(name, options)
    again = generate(name, options)
    assert list(trace.blocks) == list(again.blocks)
    assert len(trace.blocks) == 100
    assert set(trace.blocks) <= set(range(100))


def test_trace_file_has_blocks_or_csv(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("# comment\nR 5\n\nW,65536,65537\nR,4096,512\n")
    trace = read_trace(path, 65536)
    assert list(trace.blocks) == [5, 1, 2, 0]
    assert list(trace.writes) == [0, 1, 1, 0]
    assert trace.nr_blocks == 6


def test_trace_file_may_have_bare_numbers_and_small_letters(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    path.write_text("5\nr 6\nw 7\n")
    trace = read_trace(path, 65536)
    assert list(trace.blocks) == [5, 6, 7]
    assert list(trace.writes) == [0, 0, 1]


@pytest.mark.parametrize("version", [2, 3])
def test_trace_file_may_be_a_log_of_fio(tmp_path: Path, version: int) -> None:
    path, time = tmp_path / "trace", "" if version == 2 else "1842 "
    actions = ["add", "open", "read 131072 4096", "sync 131072 0", "write 65535 4"]
    actions += ["datasync 65535 0", "trim 1048576 4096", "wait 100 0", "close"]
    lines = [f"fio version {version} iolog"]
    lines += [f"{time}t.0.0 {action}" for action in actions]
    path.write_text("\n".join(lines) + "\n")
    trace = read_trace(path, 65536)
    assert list(trace.blocks) == [2, 0, 1]
    assert list(trace.writes) == [0, 1, 1]


@pytest.mark.parametrize("name", ["fio", "shift"])
def test_saved_trace_is_what_the_generator_gave(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "saved"
    size = ["--cache-blocks", "16", "--warm-up", "300", "--accesses", "200"]
    assert main(["--generator", name, "--save-trace", str(path), *size]) == 0
    options = parser().parse_args([*size])
    options.origin_blocks = 128
    generated, read = generate(name, options), read_trace(path, options.block_size)
    assert list(read.blocks) == list(generated.blocks)
    assert list(read.writes) == list(generated.writes)
    lengths = {int(line.split(",")[2]) for line in path.read_text().splitlines()}
    assert lengths == {4096 if name == "fio" else 65536}
    first = capsys.readouterr().out.split("LRU")[1]
    assert main(["--trace", str(path), *size]) == 0
    assert capsys.readouterr().out.split("LRU")[1][:7] == first[:7]


def test_only_one_generator_can_be_saved(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--save-trace", str(tmp_path / "saved")]) == 2
    assert capsys.readouterr().err.startswith("hit_ratio: --save-trace is of one")


@pytest.mark.parametrize(
    "line",
    ["R", "X 5", "R five", "R -1", "W,0,0", "R 1 2 3", "1 2", "t.0.0 frob 0 4096"],
)
def test_bad_line_of_a_trace_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "trace"
    path.write_text(f"R 1\n{line}\n")
    with pytest.raises(TraceError, match=f"{path}:2: not an access"):
        read_trace(path, 65536)


def test_command_prints_the_three_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "trace"
    lines = (f"R {n}\n" for n in itertools.islice(itertools.cycle(range(4)), 400))
    path.write_text("".join(lines))
    assert main(["--trace", str(path), "--cache-blocks", "8"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:7] == [
        "trace",
        "smq",
        "100.00%",
        "LRU",
        "100.00%",
        "Belady",
        "100.00%",
    ]


def test_trace_that_is_missing_or_empty_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tmp_path / "empty"
    empty.touch()
    assert main(["--trace", str(empty)]) == 1
    assert main(["--trace", str(tmp_path / "missing")]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert len(errors) == 2
    assert "this trace reads and writes nothing" in errors[0]
    assert "No such file" in errors[1]


@pytest.mark.parametrize("size", ["4097", "131072"])
def test_requests_must_fit_into_blocks(
    size: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--request-size", size]) == 2
    assert capsys.readouterr().err.startswith("hit_ratio: --request-size must divide")
