# SPDX-License-Identifier: Apache-2.0
"""House rules that no other tool looks at, for every file that git would commit."""

import ast
import re
import subprocess
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.support.impatience import counted_waits, short_limits, speed_limits

ROOT = Path(__file__).parent.parent

# Sizes are a ratchet. No file and no function grows past these lines, and a new one stays
# below them. One that is longer all the same stands in a table with the lines that it has
# now: it may not grow, and when it shrinks, so does its number. Each needs a reason beside it.
FILE_LINES_MAX = 700
COMPILED_LINES_MAX = 950  # of a source in Cython, which has declarations besides
FUNCTION_LINES_MAX = 70
LONG_FILES: dict[str, int] = {}
LONG_FUNCTIONS: dict[str, int] = {}  # "path/of/module.py:function"

# Folders below tests/ whose modules are imported by others. All other modules are tests.
SHARED_TESTS = ("support", "mutants", "sim")

# Rooms of tests in which no real time passes: it is simulated there, or is in the text of a mutant.
TIMELESS = ("tests/sim/", "tests/mutants/")

TEST_MODULE = re.compile(r"tests\.(\w+\.)*(test_|conftest)")

SPDX = "SPDX-License-Identifier: Apache-2.0"

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
COMPILED = tracked("*.pyx", "*.pxi", "*.pxd")
SCRIPTS = [p for p in tracked("scripts/*", ".ci/*", "Makefile") if p.suffix != ".py"]
TEXTS = [
    path
    for path in tracked("*")
    if path.suffix not in {".img", ".bin", ".png", ".gz"}
    and path.name != "LICENSE"
    and path.parent.name != "vendor"  # code of others, unchanged
]


class Facts(NamedTuple):
    """The facts of a module that the rules below need. Its tree is not kept: all trees together take a gigabyte.

    Attributes:
        functions: the name of each, and how many lines it has.
        imports: dotted names of modules, and of what is taken from them.
        says_what_it_exports: it has `__all__`, or nothing to say there.
        limits, waits, speeds: what fails on a busy machine; see `tests/support/impatience.py`.
    """

    functions: list[tuple[str, int]]
    imports: set[str]
    says_what_it_exports: bool
    limits: list[str]
    waits: list[str]
    speeds: list[str]
    doubts: list[str]


@cache
def facts_of(path: Path) -> Facts:
    tree = ast.parse(path.read_text())
    nodes = list(ast.walk(tree))
    return Facts(
        [
            (node.name, (node.end_lineno or 0) - node.lineno + 1)
            for node in nodes
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        ],
        imported_by(nodes),
        says_what_it_exports(tree),
        short_limits(nodes),
        counted_waits(nodes),
        speed_limits(nodes),
        doubted_exceptions(nodes),
    )


def is_library(path: Path) -> bool:
    return name_of(path).split("/")[0] in {"protocol", "metadata", "nbdtarget"}


# One test a rule, and not one for each of so many files: the names are in what fails.


def test_source_names_its_license_at_the_top() -> None:
    files = [*MODULES, *COMPILED, *SCRIPTS]
    assert files
    assert [
        name_of(path)
        for path in files
        if not any(line.endswith(SPDX) for line in path.read_text().splitlines()[:2])
    ] == []


def test_no_file_grows_past_its_limit() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in MODULES}
    long = {name: nr for name, nr in lines.items() if nr > FILE_LINES_MAX}
    assert long == LONG_FILES, "split it, or shrink the number in LONG_FILES"


def test_no_compiled_source_grows_past_its_limit() -> None:
    lines = {name_of(path): len(path.read_text().splitlines()) for path in COMPILED}
    assert lines
    long = {name: nr for name, nr in lines.items() if nr > COMPILED_LINES_MAX}
    assert long == {}, "split it"


def test_no_function_grows_past_its_limit() -> None:
    long = {
        f"{name_of(path)}:{name}": nr_lines
        for path in MODULES
        for name, nr_lines in facts_of(path).functions
        if nr_lines > FUNCTION_LINES_MAX
    }
    assert long == LONG_FUNCTIONS, "split it, or shrink the number in LONG_FUNCTIONS"


def imported_by(nodes: Iterable[ast.AST]) -> set[str]:
    """The dotted names that a module imports: modules, and what is taken from them."""
    names = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def imports(path: Path, forbidden: re.Pattern[str]) -> list[str]:
    names = sorted(facts_of(path).imports)
    return [f"{name_of(path)}: {name}" for name in names if forbidden.match(name)]


def modules_below(*folders: str) -> list[Path]:
    found = [path for path in MODULES if name_of(path).startswith(folders)]
    assert found
    return found


def test_no_module_imports_a_test_module() -> None:
    modules = modules_below("tests/", "scripts/")
    assert [each for path in modules for each in imports(path, TEST_MODULE)] == []


def test_only_tests_of_scripts_import_scripts() -> None:
    of_scripts = modules_below("tests/scripts/", "tests/docs/")
    tests = set(modules_below("tests/")) - set(of_scripts)
    script = re.compile(r"scripts\b")
    assert [each for path in sorted(tests) for each in imports(path, script)] == []


def test_scripts_import_only_what_tests_share() -> None:
    shared = "|".join(SHARED_TESTS)
    private = re.compile(rf"tests\.(?!({shared})\b)")
    scripts = modules_below("scripts/")
    assert [each for path in scripts for each in imports(path, private)] == []


def test_modules_that_are_no_tests_stand_where_helpers_live() -> None:
    shared = tuple(f"tests/{folder}/" for folder in SHARED_TESTS)
    names = [name_of(path) for path in modules_below("tests/")]
    ordinary = re.compile(r"(test_\w+|conftest|__init__)\.py")
    assert [
        name
        for name in names
        if not name.startswith(shared) and not ordinary.fullmatch(name.split("/")[-1])
    ] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("from tests.crash import test_walks as walks", ["tests.crash.test_walks"]),
        ("from tests.a.test_b import c", ["tests.a.test_b.c"]),
        ("def f():\n    import tests.a.conftest", ["tests.a.conftest"]),
        ("from tests.support.clock import SimClock", []),
    ],
)
def test_imports_of_test_modules_are_found(text: str, found: list[str]) -> None:
    names = imported_by(ast.walk(ast.parse(text)))
    assert [name for name in names if TEST_MODULE.match(name)] == found


def says_what_it_exports(tree: ast.Module) -> bool:
    # A module of constants alone is used as a namespace, and exports all it has.
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
    assert [
        name_of(path) for path in modules if not facts_of(path).says_what_it_exports
    ] == []


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


def test_sections_are_marked_in_one_way() -> None:
    mark = re.compile(r"^\s*# -{2,} ?[^-].*$", re.MULTILINE)
    wanted = re.compile(r"\s*# ---- .+ ----")
    found = ((name_of(path), mark.findall(path.read_text())) for path in MODULES)
    assert [
        (name, line)
        for name, lines in found
        for line in lines
        if not wanted.fullmatch(line) and "# --ignore" not in line
    ] == []


# ---- what fails on a busy machine ----


def doubted_exceptions(nodes: Iterable[ast.AST]) -> list[str]:
    """Find `error or "no words"` behind `except … as error`: an exception is always true, also one whose text is empty."""
    return [
        f"{inner.lineno}: {handler.name} or …"
        for handler in nodes
        if isinstance(handler, ast.ExceptHandler)
        for inner in ast.walk(handler)
        if isinstance(inner, ast.BoolOp)
        for each in inner.values[:-1]
        if isinstance(each, ast.Name) and each.id == handler.name
    ]


@pytest.mark.parametrize(
    ("said", "nr"), [('error or "none"', 1), ('str(error) or "none"', 0)]
)
def test_exception_that_is_taken_for_its_text_is_found(said: str, nr: int) -> None:
    text = f"try:\n    f()\nexcept OSError as error:\n    print({said})"
    assert len(doubted_exceptions(list(ast.walk(ast.parse(text))))) == nr


def test_no_exception_is_taken_for_its_text() -> None:
    found = {name_of(path): facts_of(path).doubts for path in MODULES}
    assert {name: doubts for name, doubts in found.items() if doubts} == {}


def _breaches(find: Callable[[Facts], list[str]]) -> dict[str, list[str]]:
    """Return the breaches in the modules of tests, by module."""
    found = {
        name_of(path): find(facts_of(path))
        for path in MODULES
        if name_of(path).startswith("tests/")
        and not name_of(path).startswith(TIMELESS)
        and not name_of(path).endswith("/test_impatience.py")
    }
    return {name: breaches for name, breaches in found.items() if breaches}


def test_tests_wait_for_what_is_sure_to_come() -> None:
    """Short limits fail on a busy machine, without a fault of the product: take PATIENCE_S of `tests/support/patience.py`."""
    assert _breaches(lambda facts: facts.limits) == {}


def test_no_test_counts_how_often_it_looks() -> None:
    """The duration of such a wait depends on the machine: take `until` or `attempts` of `tests/support/patience.py`."""
    assert _breaches(lambda facts: facts.waits) == {}


def test_no_test_asserts_speed() -> None:
    """Where it must be bounded, take the processor's time: `thread_time_ns`."""
    assert _breaches(lambda facts: facts.speeds) == {}
