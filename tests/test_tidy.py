# SPDX-License-Identifier: Apache-2.0
"""House rules that no other tool looks at, for every file that git would commit."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILE_LINES_MAX = 700
FUNCTION_LINES_MAX = 70

# Longer than the rule, each for a reason. This list may only shrink.
LONG_FILES: dict[str, str] = {}
LONG_FUNCTIONS: dict[str, str] = {}

SPDX = "# SPDX-License-Identifier: Apache-2.0"

# Written in pieces, so that this file does not find itself.
REGISTRIES = re.compile(
    "py" r"pi\.org|python" r"hosted\.org|--(extra-)?index-url|--find-" "links"
)
MACHINE_PATHS = re.compile(r"(?<![\w.$}~-])/(work|root|home)/\w")
UNFINISHED = re.compile(r"\b(TO" r"DO|FIX" r"ME|XX" r"X)\b")


def tracked(*patterns: str) -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    done = subprocess.run(
        [*command, "--", *patterns], cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode != 0:  # an unpacked sdist
        return [p for pattern in patterns for p in sorted(ROOT.rglob(pattern))]
    return [ROOT / name for name in done.stdout.split("\0") if (ROOT / name).is_file()]


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


MODULES = tracked("*.py")
SCRIPTS = [p for p in tracked("scripts/*", ".ci/*", "Makefile") if p.suffix != ".py"]
TEXTS = [
    path
    for path in tracked("*")
    if path.suffix not in {".img", ".bin", ".png"} and path.name != "LICENSE"
]

each_module = pytest.mark.parametrize("path", MODULES, ids=name_of)


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_library(path: Path) -> bool:
    return name_of(path).split("/")[0] in {"protocol", "metadata", "nbdtarget"}


@pytest.mark.parametrize("path", [*MODULES, *SCRIPTS], ids=name_of)
def test_source_names_its_license_at_the_top(path: Path) -> None:
    assert SPDX in path.read_text().splitlines()[:2]


@each_module
def test_file_is_short_enough_to_read(path: Path) -> None:
    lines = len(path.read_text().splitlines())
    assert lines <= FILE_LINES_MAX or name_of(path) in LONG_FILES


@each_module
def test_functions_are_short_enough_to_read(path: Path) -> None:
    long = [
        f"{name_of(path)}:{node.name}"
        for node in functions(path)
        if lines_of(node) > FUNCTION_LINES_MAX
    ]
    assert [name for name in long if name not in LONG_FUNCTIONS] == []


def test_long_lists_name_only_what_is_still_long() -> None:
    long_files = {
        name_of(p) for p in MODULES if len(p.read_text().splitlines()) > FILE_LINES_MAX
    }
    long_functions = {
        f"{name_of(path)}:{node.name}"
        for path in MODULES
        for node in functions(path)
        if lines_of(node) > FUNCTION_LINES_MAX
    }
    assert set(LONG_FILES) <= long_files
    assert set(LONG_FUNCTIONS) <= long_functions


@pytest.mark.parametrize("path", [p for p in MODULES if is_library(p)], ids=name_of)
def test_module_says_what_it_exports(path: Path) -> None:
    # A module of constants alone is used as a namespace, and exports all it has.
    tree = ast.parse(path.read_text())
    defines = any(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        for node in tree.body
    )
    exports = any(
        isinstance(target, ast.Name) and target.id == "__all__"
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
    )
    assert exports or not defines


@pytest.mark.parametrize("path", TEXTS, ids=name_of)
def test_no_registry_machine_path_or_unfinished_work_is_named(path: Path) -> None:
    text = path.read_text()
    assert not REGISTRIES.search(text)
    assert not MACHINE_PATHS.search(text)
    assert not UNFINISHED.search(text)
