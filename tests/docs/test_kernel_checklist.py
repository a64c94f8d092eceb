# SPDX-License-Identifier: Apache-2.0
"""docs/kernel-checklist.md: every number in the name of a test leads to a row, and back."""

import functools
import re
from pathlib import Path
from typing import Final

import pytest

from tests.support.places import ROOT

PAGE: Final = ROOT / "docs" / "kernel-checklist.md"
ROW: Final = re.compile(r"- \*\*(.+?)\*\*: (.+)\n  Tests: (.+)\.\n")
DEFINITION: Final = re.compile(r"^ *(?:async )?def (test_\w+)", re.MULTILINE)
NUMBER: Final = re.compile(r"test_(\d+(?:_\d+)+)_|test_(9)_")

# Sections whose rows have numbers, and how far each counts.
NUMBERED: Final = {
    "1.1": range(1, 11),
    "1.2": range(1, 13),
    "2.1 discard": range(1, 6),
    "2.2.2": range(1, 4),
    "2.2.4": range(1, 5),
    "3.1 step": range(1, 7),
    "4.1 loop": range(1, 5),
    "4.2 step": range(1, 8),
    "5.3 preresume": range(1, 7),
    "6.2": range(1, 10),
    "6.4": range(1, 17),
    "11.1": range(1, 12),
    "11.2": range(1, 25),
    "11.4": range(1, 3),
    "14": range(1, 17),
}


def rows() -> dict[str, tuple[str, ...]]:
    """The rows of the page, and the tests that each of them names."""
    found: dict[str, tuple[str, ...]] = {}
    for key, _, tests in ROW.findall(PAGE.read_text()):
        assert key not in found, f"two rows are called {key}"
        found[key] = tuple(re.findall(r"`(\w+)`", tests))
    return found


ROWS: Final = rows()
TESTS: Final = ROOT / "tests"
CHECKLIST_FILES: Final = [
    *TESTS.rglob("test_spec_*.py"),
    *TESTS.rglob("*_battery/test_*.py"),
]


def written_in(path: Path) -> list[str]:
    return DEFINITION.findall(path.read_text())


@functools.cache
def all_tests() -> set[str]:
    files = TESTS.rglob("test_*.py")
    return {name for path in files for name in written_in(path)}


def number_of(test: str) -> str:
    """The number in the name of a test, as the page writes it; empty if there is none."""
    match = NUMBER.match(test)
    return (match[1] or match[2]).replace("_", ".") if match else ""


def has_row(number: str) -> bool:
    (
        """Whether there is a row, or a section with rows, for 3.1, 11.2.10, 14.6, …."""
        ""
    )
    section, _, last = number.rpartition(".")
    known = {key.split(" ")[0] for key in ROWS}
    return number in known or f"{section} {last}" in ROWS


def test_page_has_rows_with_tests() -> None:
    assert len(ROWS) > 300
    assert all(ROWS.values())
    assert PAGE.read_text().count("\n- **") == len(ROWS)


def test_every_row_names_tests_that_exist() -> None:
    written = all_tests()
    assert {
        key: missing
        for key, tests in ROWS.items()
        if (missing := [name for name in tests if name not in written])
    } == {}


@pytest.mark.parametrize("section", NUMBERED)
def test_no_number_is_left_out(section: str) -> None:
    missing = [nr for nr in NUMBERED[section] if f"{section} {nr}" not in ROWS]
    assert missing == []


def test_every_test_with_a_number_stands_in_a_row() -> None:
    named = {name for tests in ROWS.values() for name in tests}
    numbered = {name for name in all_tests() if number_of(name)}
    numbered |= {name for path in CHECKLIST_FILES for name in written_in(path)}
    assert len(numbered) > 300
    assert sorted(numbered - named) == []


def test_every_number_in_the_name_of_a_test_has_a_row() -> None:
    numbers = {number_of(name) for name in all_tests()} - {""}
    assert sorted(number for number in numbers if not has_row(number)) == []
