# SPDX-License-Identifier: Apache-2.0
"""The catalog of mutants fits today's source. Whether each is caught: `make mutants`."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.mutants.catalog import CATALOG, ESSENTIAL
from tests.mutants.mutant import Mutant, PatchError, patched, path_of, symbols

ROOT = Path(__file__).parents[2]


# One test for the whole catalog, and not one for each of its hundreds: the names are in what fails.


def does_not_apply(mutant: Mutant) -> str:
    """Why the patch of a mutant is no longer one; empty: it is."""
    path = path_of(mutant.module, ROOT)
    try:
        text = patched(mutant, ROOT)
        compile(text, str(path), "exec")
    except (PatchError, SyntaxError) as error:
        return f"{mutant.name}: {error}"
    return "" if text != path.read_text() else f"{mutant.name} changes nothing"


@pytest.mark.slow
def test_each_mutant_applies_once_and_compiles() -> None:
    assert list(filter(None, map(does_not_apply, CATALOG))) == []


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


def test_each_mutant_says_what_a_user_would_lose_and_what_must_catch_it() -> None:
    for mutant in CATALOG:
        assert re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", mutant.name)
        assert mutant.forgets.endswith("."), mutant.name
        assert mutant.tests, mutant.name
    named = {path.split("::")[0] for mutant in CATALOG for path in mutant.tests}
    assert [path for path in sorted(named) if not (ROOT / path).exists()] == []


def test_names_are_unique_and_the_essential_ones_are_there() -> None:
    names = [mutant.name for mutant in CATALOG]
    assert len(set(names)) == len(names)
    assert set(names) >= ESSENTIAL


MODULE = """\
LIMIT = 1

class Disk:
    @property
    def size(self):
        return LIMIT

    def flush(self):
        return LIMIT
"""


def mutant_of(where: str, old: str = "return LIMIT") -> Mutant:
    return Mutant("a-mutant", "Nothing.", where, ((old, "return 0"),), ())


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    package = tmp_path / "nbdtarget"
    package.mkdir()
    (package / "disk.py").write_text(MODULE)
    return tmp_path


@pytest.mark.parametrize("symbol", ["Disk.size", "Disk.flush"])
def test_patch_changes_only_the_symbol_it_names(tree: Path, symbol: str) -> None:
    text = patched(mutant_of(f"nbdtarget.disk:{symbol}"), tree)
    begin, end = symbols(text)[symbol]
    assert "return 0" in text[begin:end]
    assert text.count("return LIMIT") == 1


def test_source_of_a_symbol_begins_with_its_decorator() -> None:
    begin, end = symbols(MODULE)["Disk.size"]
    assert MODULE[begin:end].startswith("    @property\n")
    assert MODULE[begin:end].endswith("        return LIMIT\n")


def test_patch_may_name_a_constant_or_a_whole_module(tree: Path) -> None:
    for where in ("nbdtarget.disk:LIMIT", "nbdtarget.disk"):
        text = patched(mutant_of(where, "LIMIT = 1"), tree)
        assert text.startswith("return 0\n")


@pytest.mark.parametrize(
    ("where", "old", "message"),
    [
        ("nbdtarget.disk:Disk", "return LIMIT", "nbdtarget.disk:Disk holds .* 2 times"),
        ("nbdtarget.disk:Disk.size", "return 2", "holds 'return 2' 0 times, not once"),
        ("nbdtarget.disk:flush", "", "nbdtarget.disk has no flush$"),
        (
            "nbdtarget.gone:Disk.size",
            "",
            "no module nbdtarget.gone; there is nbdtarget.disk:Disk.size",
        ),
    ],
)
def test_patch_that_does_not_fit_is_refused_with_the_place_it_names(
    tree: Path, where: str, old: str, message: str
) -> None:
    with pytest.raises(PatchError, match=f"^a-mutant: .*{message}"):
        patched(mutant_of(where, old), tree)
