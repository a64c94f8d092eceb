# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-wire`: a failing seed is told with the command that replays it."""

import random

import pytest

from scripts import fuzz_wire
from tests.support import wire_fuzz
from tests.support.wire_fuzz import Ended


def test_some_seeds_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_wire.main(["--seed", "3", "--cases", "2"]) == 0
    printed = capsys.readouterr().out
    assert "seeds 3 to 4: every case ended as it must" in printed
    assert "server handshake: " in printed


def test_a_failing_seed_is_told_with_what_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(rng: random.Random) -> Ended:
        assert rng.random() not in broken, "broken"
        return Ended("well", 1)

    broken = [random.Random(seed).random() for seed in (12, 13, 14)]

    monkeypatch.setitem(wire_fuzz.FUZZERS, "server", fails)
    arguments = ["--only", "server", "--seed", "10", "--cases", "5"]
    assert fuzz_wire.main(arguments) == 1
    printed = capsys.readouterr().out
    again = "make fuzz-wire SEED=12 CASES=1 ARGS=\"--only 'server'\""
    assert f"FAILED server, seed 12; again: {again}" in printed
    assert "AssertionError: broken" in printed


def test_seeds_can_be_named_anew(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--only", "client handshake", "--cases", "20", "--name-seeds"]
    assert fuzz_wire.main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith('    "client handshake": {\n        "')


def test_a_run_may_be_as_long_as_so_many_messages(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def quickly(rng: random.Random) -> Ended:
        return Ended("well", 7)

    monkeypatch.setitem(wire_fuzz.FUZZERS, "server", quickly)
    assert fuzz_wire.main(["--only", "server", "--messages", "50"]) == 0
    printed = capsys.readouterr().out
    assert "56  messages: server" in printed
    assert "seeds 0 to 7: every case ended as it must" in printed


def test_progress_is_told_and_ctrl_c_loses_no_counts(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stops = random.Random(13).random()

    def is_stopped(rng: random.Random) -> Ended:
        if rng.random() == stops:
            raise KeyboardInterrupt
        return Ended("well", 7)

    monkeypatch.setitem(wire_fuzz.FUZZERS, "server", is_stopped)
    monkeypatch.setattr(fuzz_wire, "PROGRESS_S", 0.0)
    assert fuzz_wire.main(["--only", "server", "--seed", "10"]) == 130
    printed = capsys.readouterr()
    assert "seed 12: 14 messages\n" in printed.err
    assert "interrupted in seed 13\n" in printed.out
    assert "21  messages: server\n" in printed.out
    assert "seeds 10 to 12: every case ended as it must" in printed.out
