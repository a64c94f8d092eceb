# SPDX-License-Identifier: Apache-2.0
"""scripts/bench_hydration.py and bench_p99.py: what they say of figures."""

from scripts import bench, bench_p99
from scripts.bench_hydration import Copy, summarize
from scripts.bench_p99 import Sample

GIB = 1 << 30


def copies(*seconds: float) -> list[Copy]:
    return [Copy(each, each / 2, 40.0) for each in seconds]


def test_ratios_are_of_rounds_with_and_without_the_start() -> None:
    found = summarize(
        {
            "nbdcopy": copies(2, 4, 6),
            "clone": copies(2, 2, 6),
            "start": copies(1, 1, 1),
        },
        2 * GIB,
    )
    assert (found["nbdcopy_s"], found["clone_s"], found["start_s"]) == (4, 2, 1)
    assert found["ratio"] == 1.0  # of 1, 2, 1
    assert found["ratio_without_start"] == 2.0  # of 2, 4, 1.2
    assert found["nbdcopy_cpu_s_per_gib"] == 1.0
    assert found["clone_cpu_s_per_gib"] == 0.25


def test_ratio_of_latencies_is_the_median_of_the_rounds_own() -> None:
    def sample(p99_us: float) -> Sample:
        return Sample(1.0, p99_us, p99_us, 0.0)

    rounds = [
        [sample(quiet), sample(busy)] for quiet, busy in ((1, 3), (10, 20), (2, 2))
    ]
    assert bench_p99.ratio(rounds, "p99_us") == 2.0


def test_p99_is_a_part_of_the_bench() -> None:
    options = bench.parse(["--only", "p99"])
    assert (options.p99, options.servers, options.caches) == (True, False, [])
    assert bench.parse([]).p99
