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
    if path.suffix not in {".img", ".bin", ".png", ".gz"} and path.name != "LICENSE"
]


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def lines_of(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def is_library(path: Path) -> bool:
    return name_of(path).split("/")[0] in {"protocol", "metadata", "nbdtarget"}


# One test a rule, and not one for each of so many files: the names are in what fails.


def test_source_names_its_license_at_the_top() -> None:
    files = [*MODULES, *SCRIPTS]
    assert files
    assert [
        name_of(path) for path in files if SPDX not in path.read_text().splitlines()[:2]
    ] == []


def test_files_are_short_enough_to_read() -> None:
    long = {
        name_of(p) for p in MODULES if len(p.read_text().splitlines()) > FILE_LINES_MAX
    }
    # The list names what is still long, and nothing else.
    assert long == set(LONG_FILES)


def test_functions_are_short_enough_to_read() -> None:
    long = {
        f"{name_of(path)}:{node.name}"
        for path in MODULES
        for node in functions(path)
        if lines_of(node) > FUNCTION_LINES_MAX
    }
    assert long == set(LONG_FUNCTIONS)


def says_what_it_exports(path: Path) -> bool:
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
    return exports or not defines


def test_modules_say_what_they_export() -> None:
    modules = [path for path in MODULES if is_library(path)]
    assert modules
    assert [name_of(p) for p in modules if not says_what_it_exports(p)] == []


@pytest.mark.parametrize("unwanted", [REGISTRIES, MACHINE_PATHS, UNFINISHED])
def test_no_registry_machine_path_or_unfinished_work_is_named(
    unwanted: re.Pattern[str],
) -> None:
    found = ((name_of(path), unwanted.search(path.read_text())) for path in TEXTS)
    assert [(name, match.group()) for name, match in found if match] == []


def test_logger_of_a_module_is_called_log() -> None:
    made = re.compile(r"^(\w+) = logging\.getLogger\(__name__\)$", re.MULTILINE)
    names = {
        name_of(path): made.findall(path.read_text())
        for path in MODULES
        if is_library(path)
    }
    assert sum(map(len, names.values())) > 30
    assert {name: found for name, found in names.items() if set(found) - {"log"}} == {}


def test_size_of_a_sector_is_written_once_in_a_package() -> None:
    sector = re.compile(r"^_?SECTOR\w*(: Final)? = 512\b", re.MULTILINE)
    homes = [
        name_of(path)
        for path in MODULES
        if is_library(path) and sector.search(path.read_text())
    ]
    assert sorted(homes) == [
        "metadata/nbdtarget_metadata/units.py",
        "nbdtarget/common/units.py",
        # The least size that the header of a log may name.
        "nbdtarget/targets/log_writes/format.py",
    ]
