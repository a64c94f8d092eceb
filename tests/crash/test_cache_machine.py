# SPDX-License-Identifier: Apache-2.0
"""Random walks with power cuts over caches in all modes, each decided by its seed.

As `test_machine.py`, with what a cache has besides: CACHE requests promote, messages pin, warm, clean
and invalidate, each load may bring another mode or policy. Now and then everything stops, and a cache
that is clean must do nothing at all (J8).
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.support.crash.cache_rigs import (
    CacheRig,
    LoggedCacheRig,
    PassthroughRig,
    SwitchingCacheRig,
    WritethroughRig,
    small_blocks,
)
from tests.support.crash.cache_walks import MakeRig, walk_or_tell
from tests.support.crash.lazy_device import LazyDevice

WALKS = int(os.environ.get("SIM_WALKS", "8"))
SEED = int(os.environ.get("SIM_SEED", "0"))


@pytest.fixture(autouse=True)
def small_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.cache_rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rig", "events"),
    [
        (
            CacheRig,
            ("promotions", "demotions", "writebacks", "sweeps", "overwrites"),
        ),
        (LoggedCacheRig, ("promotions", "demotions", "sweeps", "logged writes")),
        (
            WritethroughRig,
            ("promotions", "demotions", "writes through", "given up", "used alone"),
        ),
        (PassthroughRig, ("promotions", "invalidations", "refusals", "J3")),
        (
            SwitchingCacheRig,
            ("promotions", "demotions", "writebacks", "refusals", "given up"),
        ),
    ],
)
def test_no_acknowledged_flush_is_lost(rig: MakeRig, events: tuple[str, ...]) -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS):
        counts += walk_or_tell(rig, seed)
    for what in (*events, "discards", "J1", "J2", "J4", "J5", "J6", "J7", "J8"):
        assert counts[what] > WALKS // 3, (what, counts)
