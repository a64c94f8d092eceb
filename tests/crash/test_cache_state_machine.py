# SPDX-License-Identifier: Apache-2.0
"""The hypothesis machine over caches: `test_state_machine.py` tells what it does."""

import logging
from collections.abc import Iterator

import pytest

from tests.support.crash.cache_rigs import CacheRig, SwitchingCacheRig, small_blocks
from tests.support.crash.lazy_device import LazyDevice
from tests.support.crash.state_machine import DEEP, EXAMPLES, run_machine


@pytest.fixture(autouse=True)
def small_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.cache_rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    with small_blocks():
        yield
    logging.disable(logging.NOTSET)


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rig", [CacheRig, SwitchingCacheRig])
def test_cache_keeps_its_word(rig: type[CacheRig]) -> None:
    counts = run_machine(rig, EXAMPLES if DEEP else EXAMPLES // 10)
    assert all(counts[f"J{nr}"] >= 10 for nr in (1, 2, 4, 5, 6, 7)), counts
    assert counts["promotions"]
