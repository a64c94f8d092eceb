# SPDX-License-Identifier: Apache-2.0
"""The simulated fleet: it ends, counts right, and says the same each time."""

import pytest

from nbdtarget.porcelain.trace_file import read_trace
from scripts.fleet_sim import TRACE, WAYS, Model, fitted, run

MIB = 1 << 20
SMALL = Model(image_bytes=8 * MIB)
BOOT = [(nr * MIB, nr * MIB + 65536) for nr in (5, 1, 7, 2)]


@pytest.mark.parametrize("way", WAYS)
def test_each_way_reads_the_whole_image(way: str) -> None:
    result = run(SMALL, BOOT, way, 2)
    assert result.nr_clones == 2
    copies = 1 if way.startswith("cache") else 2
    assert 8 * copies / 2 <= result.mib <= 8 * copies / 2 + 3
    assert 0 < result.first_read_s < result.booted_s
    assert result.hydrated_s > 0
    assert result.dollars == pytest.approx(
        result.requests * 2 * SMALL.dollars_per_request
    )
    assert run(SMALL, BOOT, way, 2) == result


def test_store_that_throttles_is_obeyed() -> None:
    model = Model(image_bytes=8 * MIB, requests_per_s=3.0)
    result = run(model, BOOT, "store", 3)
    assert result.refused > 0
    assert result.hydrated_s > 1.0


def test_trace_is_fitted_to_the_image() -> None:
    trace = fitted(read_trace(str(TRACE)), 64 * MIB)
    assert len(trace) > 300
    assert all(0 <= begin < end <= 64 * MIB for begin, end in trace)
    assert fitted([(0, 10), (8192, 16384)], 8192) == [(0, 10), (0, 8192)]
