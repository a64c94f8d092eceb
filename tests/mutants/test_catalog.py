# SPDX-License-Identifier: Apache-2.0
"""The catalog of mutants fits today's source. Whether each is caught: `make mutants`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalog import CATALOG, ESSENTIAL
from tests.mutants.mutant import Mutant, PatchError, patched

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", CATALOG, ids=lambda mutant: mutant.name)
def test_mutant_applies_once_and_compiles(mutant: Mutant) -> None:
    source = (ROOT / mutant.file).read_text()
    text = patched(mutant, ROOT)
    assert text != source
    compile(text, mutant.file, "exec")


@pytest.mark.slow
def test_mutants_use_no_name_that_is_not_there(tmp_path: Path) -> None:
    # A NameError would be caught by any test, and prove nothing.
    for mutant in CATALOG:
        (tmp_path / f"{mutant.name}.py").write_text(patched(mutant, ROOT))
    ruff = ["ruff", "check", "--isolated", "--no-cache", "--select=F821,F823"]
    run = subprocess.run(
        [sys.executable, "-m", *ruff, "--output-format=concise", str(tmp_path)],
        check=False,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("mutant", CATALOG, ids=lambda mutant: mutant.name)
def test_mutant_says_what_a_user_would_lose_and_what_must_catch_it(
    mutant: Mutant,
) -> None:
    assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", mutant.name)
    assert mutant.forgets.endswith(".")
    assert mutant.tests
    assert all((ROOT / path.split("::")[0]).exists() for path in mutant.tests)


def test_names_are_unique_and_the_essential_ones_are_there() -> None:
    names = [mutant.name for mutant in CATALOG]
    assert len(set(names)) == len(names)
    assert set(names) >= ESSENTIAL


def test_patch_that_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "twice.py").write_text("a = 1\na = 1\n")
    for old, count in (("a = 1\n", 2), ("b = 1\n", 0)):
        mutant = Mutant("no-fit", "Nothing.", "twice.py", ((old, ""),), ())
        with pytest.raises(PatchError, match=rf"no-fit: twice\.py .* {count} times"):
            patched(mutant, tmp_path)
