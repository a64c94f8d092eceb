# SPDX-License-Identifier: Apache-2.0
"""Random walks of the crash machine over every target, each decided by its seed.

A walk is a list of steps, drawn before it begins, so a failing one can be shortened by
leaving steps out: what is reported is the shortest list that still fails, with its seed. More
and longer walks, from another seed on, here and in the other files that walk:

    SIM_WALKS=2000 SIM_STEPS=200 SIM_SEED=7 python -m pytest tests/crash -k 'machine or features or faults'

One target in a registry, and nothing around it; whole servers, clients and stacks are `make sim`.

The hypothesis machine (`test_state_machine.py`) has more rules, and shrinks; these walks are
cheaper. In 60 examples of hypothesis a device that ignores every FLUSH was not found unless
each step was a crash point; 60 of these walks find it 39 times.
"""

import os
from collections import Counter

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, Bio
from tests.support.crash.rigs import (
    CloneRig,
    LinearRig,
    WornCloneRig,
)
from tests.support.crash.walks import SEED, MakeRig, seeds_that_fail, walk_or_tell
from tests.support.devices import CrashDevice

WALKS = int(os.environ.get("SIM_WALKS", "150"))


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("rig", [CloneRig, LinearRig])
def test_no_acknowledged_flush_is_lost(rig: MakeRig) -> None:
    for seed in range(SEED, SEED + WALKS):
        walk_or_tell(rig, seed)


@pytest.mark.slow
def test_no_acknowledged_flush_is_lost_while_journals_are_compacted() -> None:
    counts: Counter[str] = Counter()
    for seed in range(SEED, SEED + WALKS // 5):
        counts += walk_or_tell(WornCloneRig, seed)
    assert counts["compactions"]


class LyingDevice(CrashDevice):
    """Ends each FLUSH, and makes nothing stable."""

    def _make_stable(self, mark: int) -> None:
        """Nothing."""


class ForgetfulDevice(CrashDevice):
    """Takes no notice of FUA."""

    def submit(self, bio: Bio) -> None:
        bio.flags &= ~FUA
        super().submit(bio)


class HastyDevice(CrashDevice):
    """Ends a FLUSH before it is carried out."""

    def submit(self, bio: Bio) -> None:
        if bio.op == OP_FLUSH:
            bio.end(0)
        else:
            super().submit(bio)


class KeepingDevice(CrashDevice):
    """Keeps a borrowed payload after `submit`, without owning it."""

    def submit(self, bio: Bio) -> None:
        bio.borrowed = False
        super().submit(bio)


@pytest.mark.parametrize(
    "device", [LyingDevice, ForgetfulDevice, HastyDevice, KeepingDevice]
)
def test_machine_catches_a_device_that_lies(
    device: type[CrashDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.crash.rigs.CrashDevice", device)
    assert seeds_that_fail(LinearRig, 20)
