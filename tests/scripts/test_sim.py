# SPDX-License-Identifier: Apache-2.0
"""`make sim`: failing seeds at once with the way to replay them, a summary, an exit status."""

import sys

import pytest

from scripts import sim
from tests.sim.world import History, simulate


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["sim", *arguments])
    return sim.main()


def fails_at_3(seed: int, *, rig_name: str | None = None) -> History:
    history = History(seed, "clone", nr_crashes=5, simulated_s=3600.0)
    if seed == 3:
        history.failure = AssertionError("lost")
        history.events = ("the last event",)
    return history


def test_failing_seed_is_printed_and_the_run_goes_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sim, "simulate", fails_at_3)
    arguments = ("--from", "1", "--crashes", "30", "--processes", "1", "--rig", "clone")
    assert run(monkeypatch, *arguments) == 1
    first, summary = capsys.readouterr().out.splitlines()
    assert first.startswith("FAILED  make sim SEED=3 RIG=clone  (clone: ")
    assert "lost" in first
    assert summary.startswith("6 seeds from 1: 30 crashes, ")
    assert "6.0 simulated hours" in summary
    assert summary.endswith("1 failed")


def test_sound_run_exits_0(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("--from", "1", "--crashes", "1", "--processes", "1")
    assert run(monkeypatch, *arguments) == 0


def test_replay_shows_the_events_and_the_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sim, "simulate", fails_at_3)
    assert run(monkeypatch, "--seed", "3") == 1
    shown = capsys.readouterr().out
    assert "the last event" in shown
    assert "AssertionError: lost" in shown


def test_replay_is_the_same_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "--seed", "35") == 0
    assert simulate(35).digest in capsys.readouterr().out
