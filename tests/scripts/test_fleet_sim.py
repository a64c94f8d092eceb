# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet: it ends, counts right, and says the same each time."""

import pytest

from scripts.fleet_sim import WAYS, Model, run, scaled, synthetic_trace

MIB = 1 << 20
SMALL = Model(image_bytes=8 * MIB)
TRACE = [(nr * MIB, nr * MIB + 65536) for nr in (5, 1, 7, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_reads_the_whole_image(way: str) -> None:
    result = run(SMALL, TRACE, way, 2)
    assert result.nr_clones == 2
    copies = 1 if way == "cache" else 2
    assert 8 * copies / 2 <= result.mib <= 8 * copies / 2 + 3
    assert 0 < result.first_read_s < result.booted_s
    assert result.hydrated_s > 0
    assert result.dollars == pytest.approx(
        result.requests * 2 * SMALL.dollars_per_request
    )
    assert run(SMALL, TRACE, way, 2) == result


def test_store_that_throttles_is_obeyed() -> None:
    model = Model(image_bytes=8 * MIB, requests_per_s=3.0)
    result = run(model, TRACE, "store", 3)
    assert result.refused > 0
    assert result.hydrated_s > 1.0


def test_made_up_trace_lies_inside() -> None:
    trace = synthetic_trace(64 * MIB)
    assert trace == synthetic_trace(64 * MIB)
    assert all(0 <= begin < end <= 64 * MIB for begin, end in trace)
    assert 4 * MIB < sum(end - begin for begin, end in trace) < 8 * MIB
    assert scaled([(0, 10), (90, 110), (200, 300)], 100) == [(0, 10), (90, 100)]
