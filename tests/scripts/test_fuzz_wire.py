# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-wire`: a failing seed is told with the command that replays it."""

import pytest

from scripts import fuzz_wire
from tests.support import wire_fuzz


def test_some_seeds_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_wire.main(["--seed", "3", "--cases", "2"]) == 0
    printed = capsys.readouterr().out
    assert "seeds 3 to 4: every case ended as it must" in printed
    assert "server handshake: " in printed


def test_a_failing_seed_is_told_with_what_replays_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(seed: int) -> str:
        assert seed < 12, "broken"
        return "well"

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
