# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-fast`: each kind of round reaches the compiled code, and counts what that has taken."""

import random
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from scripts import fuzz_fast
from scripts.fuzz_fast_files import KINDS, FlakyFile
from scripts.fuzz_fast_plane import Round
from scripts.fuzz_fast_receiver import ReceiverRound

NR_SEEDS, NR = 6, 60

pytestmark = pytest.mark.skipif(not compiled.IS_COMPILED, reason=compiled.describe())


@pytest.mark.parametrize("kind", range(len(fuzz_fast.ROUNDS)))
def test_most_of_what_is_sent_counts(kind: int, tmp_path: Path) -> None:
    make, _ = fuzz_fast.ROUNDS[kind]
    nr_taken = 0
    for seed in range(NR_SEEDS):
        it = make(seed, tmp_path)
        try:
            nr_taken += it.run(NR)
        finally:
            it.close()
    assert nr_taken > NR_SEEDS * NR // 2


@pytest.mark.parametrize("make", [Round, ReceiverRound])
def test_some_reads_are_sent_from_windows(make: type[Round], tmp_path: Path) -> None:
    nr_sent = 0
    for seed in range(2 * NR_SEEDS):
        it = make(seed, tmp_path)
        try:
            it.run(5 * NR)
        finally:
            nr_sent += 0 if it.windows is None else it.windows.nr_sent
            it.close()
    assert nr_sent >= 10


def test_rounds_of_every_kind_run(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_fast.run_rounds(0, 50_000) == 0
    said = capsys.readouterr().out
    for make, _ in fuzz_fast.ROUNDS:
        assert f" {make.__name__}" in said


def test_every_kind_of_file_is_chosen(tmp_path: Path) -> None:
    pick, found = random.Random(1), set()
    for _ in range(200):
        file = FlakyFile(tmp_path / "file", bytes(4096), pick, may_change=True)
        found.add(file.kind)
        file.close()
    assert found == set(KINDS)
