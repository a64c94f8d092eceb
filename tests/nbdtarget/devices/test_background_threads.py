# SPDX-License-Identifier: Apache-2.0
"""Threads that come after those who serve clients, with the compiled half and without."""

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable

import pytest

from nbdtarget.devices.background_threads import NICE_STEP, begin_to_give_way
from nbdtarget.fast import compiled

SCHED_GETATTR = {"x86_64": 315, "aarch64": 275}
# struct sched_attr, as it was at first: size, policy, flags, nice, priority, runtime, deadline, period.
SCHED_ATTR = struct.Struct("=IIQiIQQQ")


def in_a_thread(look: Callable[[], object]) -> object:
    """Return what `look` sees in a thread that gives way."""
    seen: list[object] = []

    def work() -> None:
        begin_to_give_way()
        seen.append(look())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    return seen[0]


def priority() -> tuple[int, int]:
    return os.getpriority(os.PRIO_PROCESS, 0), os.sched_getscheduler(0)


def slice_ns() -> int:
    buffer = ctypes.create_string_buffer(SCHED_ATTR.size)
    number = SCHED_GETATTR[platform.machine()]
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.syscall(number, 0, buffer, SCHED_ATTR.size, 0) == 0
    return int(SCHED_ATTR.unpack(buffer.raw)[5])


@pytest.mark.parametrize("is_compiled", [False, True])
def test_they_are_nicer_batch_jobs_and_others_stay(
    monkeypatch: pytest.MonkeyPatch, is_compiled: bool
) -> None:
    if is_compiled and not compiled.IS_COMPILED:
        pytest.skip(compiled.describe())
    monkeypatch.setattr(compiled, "IS_COMPILED", is_compiled)
    before = priority()
    assert in_a_thread(priority) == (min(before[0] + NICE_STEP, 19), os.SCHED_BATCH)
    assert priority() == before


@pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())
@pytest.mark.skipif(
    platform.machine() not in SCHED_GETATTR, reason="the number of the system call"
)
def test_their_time_slice_is_longer_than_that_of_others() -> None:
    ordinary_ns = slice_ns()
    if not ordinary_ns:
        pytest.skip("this kernel has no time slices to choose from: it is before 6.12")
    found = in_a_thread(slice_ns)
    assert isinstance(found, int)
    assert found > ordinary_ns


def test_where_it_is_forbidden_they_are_less_polite(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(compiled, "IS_COMPILED", False)
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    nice, policy = priority()
    assert in_a_thread(priority) == (min(nice + NICE_STEP, 19), policy)
