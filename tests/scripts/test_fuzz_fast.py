# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-fast`: each kind of round reaches the compiled code, and counts what that has taken."""

import random
from pathlib import Path

import pytest

from nbdtarget.fast import compiled
from scripts import fuzz_fast
from scripts.fuzz_fast_files import KINDS, FlakyFile

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
