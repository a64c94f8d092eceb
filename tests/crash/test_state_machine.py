# SPDX-License-Identifier: Apache-2.0
"""One hypothesis state machine for any target; its rig says what is special.

The rules are what a client, an administrator and the mains may do, at any time: submit a bio and
not wait for it, let time pass, send a message, suspend, load, resume, cut the power with an
image that hypothesis chooses, reopen. After each step the oracle (`tests/support/model.py`) and
the invariants of the target (`tests/support/crash/invariants.py`: of a clone, I1 to I7) must hold; I1
as if the power were cut right there.

In the gate the examples are always the same. `CRASH_DEEP=1` tries many more, new ones each
time, for minutes, and prints how to see a failure again.
"""

import logging
from collections.abc import Iterator

import pytest

from tests.support.crash.lazy_device import LazyDevice
from tests.support.crash.rigs import LinearRig, QuietCloneRig, WornCloneRig
from tests.support.crash.state_machine import EXAMPLES, run_machine


@pytest.fixture(autouse=True)
def quiet_and_lazy(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", LazyDevice)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.long
def test_clone_keeps_its_word() -> None:
    counts = run_machine(QuietCloneRig)
    # On more regions, which hydrate by themselves, with compactions; slower.
    counts += run_machine(WornCloneRig, EXAMPLES // 3)
    # Each was looked at several times. How often depends on what hypothesis draws, and that on the modules
    # that other tests have imported before.
    assert all(counts[f"I{nr}"] >= 5 for nr in range(1, 8)), counts
    assert counts["compactions"]


@pytest.mark.slow
def test_linear_keeps_its_word() -> None:
    run_machine(LinearRig, EXAMPLES // 2)
