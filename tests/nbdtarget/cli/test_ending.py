# SPDX-License-Identifier: Apache-2.0
"""A block that a signal ends is cleared up, and the handlers are put back."""

import os
import signal
import threading

import pytest

from nbdtarget.cli.ending import SIGNALS, in_order


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_ends_the_block_and_the_second_has_its_effect(
    number: signal.Signals,
) -> None:
    before = [signal.getsignal(each) for each in SIGNALS]
    cleared: list[object] = []

    def work() -> None:
        try:
            os.kill(os.getpid(), number)
            signal.pause()
        finally:
            cleared.extend(signal.getsignal(each) for each in SIGNALS)

    with pytest.raises(SystemExit) as ended, in_order():
        work()
    assert ended.value.code == 128 + number
    assert cleared == [signal.SIG_DFL] * len(SIGNALS)
    assert [signal.getsignal(each) for each in SIGNALS] == before


def test_an_ignored_signal_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with in_order():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_another_thread_changes_nothing() -> None:
    found: list[object] = []

    def work() -> None:
        with in_order():
            found.extend(signal.getsignal(each) for each in SIGNALS)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(each) for each in SIGNALS]
