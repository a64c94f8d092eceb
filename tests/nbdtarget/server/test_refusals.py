# SPDX-License-Identifier: Apache-2.0
"""Clients that were refused: counted, and logged a bounded number of times."""

import pytest

from nbdtarget.server.refusals import (
    REASONS,
    REFUSALS_LOGGED_MAX,
    REFUSALS_PERIOD_S,
    Refusals,
)
from tests.support.clock import SimClock


def test_scanner_cannot_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    clock = SimClock()
    refusals = Refusals(clock)
    assert tuple(refusals.counts) == REASONS
    for nr in range(REFUSALS_LOGGED_MAX):
        refusals.note("rules", f"client {nr}")
    refusals.note("tls", "one too many")
    refusals.note("certificate", "one too many")
    refusals.note("certificate", "one too many")
    said = [each.getMessage() for each in caplog.records]
    assert said == [f"client {nr}" for nr in range(REFUSALS_LOGGED_MAX)]
    clock.advance(REFUSALS_PERIOD_S)
    last = caplog.records[-1].getMessage()
    assert last == "3 more clients were refused: tls 1, certificate 2"
    assert refusals.counts["certificate"] == 2
    refusals.note("tls", "a new period")
    assert caplog.records[-1].getMessage() == "a new period"


def test_quiet_period_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    clock = SimClock()
    refusals = Refusals(clock)
    refusals.note("rules", "client 1")
    clock.advance(REFUSALS_PERIOD_S)
    assert len(caplog.records) == 1


def test_those_that_were_left_out_are_told_at_the_end(
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = SimClock()
    refusals = Refusals(clock)
    for _ in range(REFUSALS_LOGGED_MAX + 1):
        refusals.note("tls", "x")
    refusals.close()
    assert caplog.records[-1].getMessage() == "1 more clients were refused: tls 1"
    clock.advance(2 * REFUSALS_PERIOD_S)
    refusals.close()
    assert len(caplog.records) == REFUSALS_LOGGED_MAX + 1
