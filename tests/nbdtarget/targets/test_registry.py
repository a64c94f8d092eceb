# SPDX-License-Identifier: Apache-2.0
"""Targets are found by their names, and imported when a table first names them."""

import subprocess
import sys

import pytest

from nbdtarget.targets.registry import TARGET_TYPES, load_all

_IMPORTED = (
    "import sys\n"
    "from nbdtarget.targets.registry import TARGET_TYPES, load_all\n"
    "{}\n"
    "print(*(name for name in sys.modules if name.startswith('nbdtarget.targets.')))"
)


def imported_by(line: str) -> set[str]:
    script = _IMPORTED.format(line)
    ran = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    )
    return set(ran.stdout.split())


@pytest.mark.parametrize("name", TARGET_TYPES)
def test_a_target_is_found_by_its_own_name(name: str) -> None:
    assert TARGET_TYPES[name].type_name == name


def test_looking_for_a_name_imports_nothing() -> None:
    assert imported_by("'clone' in TARGET_TYPES, sorted(TARGET_TYPES)") == {
        "nbdtarget.targets.base",
        "nbdtarget.targets.registry",
        *imported_by("pass"),
    }


def test_one_target_does_not_bring_the_others() -> None:
    found = imported_by("TARGET_TYPES['clone']")
    assert "nbdtarget.targets.clone.target" in found
    assert not {name for name in found if name.startswith("nbdtarget.targets.cache")}


def test_all_are_imported_at_once_on_demand() -> None:
    wanted = {each.__module__ for each in TARGET_TYPES.values()}
    assert wanted <= imported_by("load_all()")
    load_all()
