# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: every deliberate bug of the catalog must be caught by a test.

    make mutants [ARGS='--only NAME --jobs N --timeout S --tests PATH… --list']

The tree is copied to a temporary directory, once for each job. There the tests that the
catalog names are run on the source as it is, and must pass; then with one mutant after the
other, until the first test fails. A mutant that no test notices has SURVIVED. One that
fails for a wrong reason (an import, a name, a syntax) is BROKEN and proves nothing, and
neither does one that takes longer than `--timeout`, unless the catalog expects a hang.

Exit status: 0 if every mutant is caught, else 1; 2 for a wrong option.
"""

import argparse
import compileall
import os
import py_compile
import queue
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Final, NamedTuple

from tests.mutants.catalog import CATALOG
from tests.mutants.mutant import ROOTS, Mutant, patched, path_of
from tests.support.patience import PATIENCE_S

ROOT: Final = Path(__file__).parents[1]
PACKAGES: Final = ("nbdtarget", "protocol", "metadata", "tests", "scripts")
FILES: Final = ("pyproject.toml", "Makefile", "docs/reference/configuration.md")
JOBS: Final = 2
# A test that waits in vain for what a mutant never does fails after PATIENCE_S: then the mutant is caught.
TIMEOUT_S: Final = PATIENCE_S + 120.0
HANG_S: Final = 120.0  # of a mutant that the catalog expects to hang
BASELINE_TIMEOUT_S: Final = 600.0
BASELINE_S_PER_FILE: Final = 30.0  # of tests, where there are many of them
OUTPUT_LINES_MAX: Final = 40  # of a run that fails for a wrong reason

# How pytest ends: 0 all passed, 1 a test failed; 2 and above: it could not even collect.
PASSED: Final = 0
FAILED: Final = 1
_FAILURE: Final = re.compile(r"^(?:FAILED|ERROR) (.*?)(?: - (.*))?$", re.MULTILINE)
# A mutant that is no bug, but no program either, fails with one of these errors.
_BROKEN: Final = re.compile(
    r"^(?:ImportError|ModuleNotFoundError|NameError|UnboundLocalError|SyntaxError"
    r"|IndentationError)\b"
)


class Run(NamedTuple):
    """The result of the tests; `status` is None if they took too long."""

    status: int | None
    output: str
    seconds: float


class Verdict(NamedTuple):
    """The result of a mutant."""

    mutant: Mutant
    is_caught: bool
    line: str


def copy_tree(to: Path) -> None:
    """Copy what tests need. Compiled files follow the hash of their source, not its time:
    a mutant lives for less than a second's tick."""
    ignore = shutil.ignore_patterns("__pycache__", ".*")
    for name in PACKAGES:
        shutil.copytree(ROOT / name, to / name, ignore=ignore)
    for name in FILES:
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, to / name)
    compileall.compile_dir(
        str(to),
        quiet=2,
        invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH,
    )


def run_python(tree: Path, arguments: Sequence[str], timeout_s: float) -> Run:
    """Run Python in `tree`, importing from nowhere else; end all of it after a while."""
    begun = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, *arguments],
        cwd=tree,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(tree / base) for base in ROOTS),
            "TMPDIR": str(tree / "tmp"),
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    status: int | None
    try:
        output, _ = process.communicate(timeout=timeout_s)
        status = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        status = None
    return Run(status, output, time.monotonic() - begun)


def run_tests(tree: Path, paths: Iterable[str], timeout_s: float) -> Run:
    """Run the tests up to the first that fails."""
    options = ["-x", "-q", "--tb=line", "--show-capture=no", "-rfE"]
    plugins = ["-p", "no:cacheprovider"]
    arguments = ["-m", "pytest", *options, *plugins, *paths]
    return run_python(tree, arguments, timeout_s)


def import_error(tree: Path, mutant: Mutant) -> str:
    """Return what goes wrong when the mutant is imported; empty: nothing does."""
    program = f"import {mutant.module} as m; print(m.__file__)"
    run = run_python(tree, ["-c", program], TIMEOUT_S)
    if run.status == 0 and Path(run.output.strip()) == path_of(mutant.module, tree):
        return ""
    return (run.output.strip().splitlines() or ["nothing was imported"])[-1]


def judge(
    mutant: Mutant, tree: Path, tests: Sequence[str], timeout_s: float
) -> Verdict:
    """Apply the mutant in `tree`, see what the tests say, and take it back."""
    path = path_of(mutant.module, tree)
    source = path.read_text()
    path.write_text(patched(mutant, tree))
    try:
        error = import_error(tree, mutant)
        if error:
            return Verdict(mutant, False, f"BROKEN   {mutant.name}: {error}")
        limit_s = min(timeout_s, HANG_S) if mutant.hangs else timeout_s
        run = run_tests(tree, tests or mutant.tests, limit_s)
    finally:
        path.write_text(source)
    took = f"({run.seconds:.1f} s)"
    if run.status is None and mutant.hangs:
        return Verdict(mutant, True, f"caught   {mutant.name}  by timeout {took}")
    if run.status is None:
        return Verdict(mutant, False, f"HANGS    {mutant.name}  {took}")
    if run.status == PASSED:
        return Verdict(mutant, False, f"SURVIVED {mutant.name}  {took}")
    failure = _FAILURE.search(run.output)
    if run.status != FAILED or failure is None:
        tail = "\n".join(run.output.splitlines()[-OUTPUT_LINES_MAX:])
        return Verdict(mutant, False, f"BROKEN   {mutant.name}  {took}\n{tail}")
    test, reason = failure.group(1), failure.group(2) or ""
    if _BROKEN.match(reason):
        return Verdict(mutant, False, f"BROKEN   {mutant.name}  by {test}: {reason}")
    return Verdict(mutant, True, f"caught   {mutant.name}  by {test} {took}")


def run_mutants(options: argparse.Namespace, mutants: Sequence[Mutant]) -> bool:
    """Judge all of them; tell whether each was caught."""
    trees: queue.Queue[Path] = queue.Queue()
    with tempfile.TemporaryDirectory(prefix="mutants-") as directory:
        for nr in range(options.jobs):
            tree = Path(directory, str(nr))
            copy_tree(tree)
            (tree / "tmp").mkdir()
            trees.put(tree)
        paths = dict.fromkeys(
            options.tests or [path for each in mutants for path in each.tests]
        )
        first = trees.get()
        timeout_s = max(BASELINE_TIMEOUT_S, BASELINE_S_PER_FILE * len(paths))
        baseline = run_tests(first, paths, timeout_s)
        trees.put(first)
        if baseline.status != PASSED:
            print(baseline.output)
            print("the tests fail on the source as it is: nothing can be said")
            return False
        print(f"passed   the source as it is ({baseline.seconds:.1f} s)", flush=True)

        def in_some_tree(mutant: Mutant) -> Verdict:
            tree = trees.get()
            try:
                return judge(mutant, tree, options.tests, options.timeout)
            finally:
                trees.put(tree)

        escaped = []
        pool = ThreadPoolExecutor(options.jobs)
        try:
            for done in as_completed([pool.submit(in_some_tree, m) for m in mutants]):
                verdict = done.result()
                print(verdict.line, flush=True)
                if not verdict.is_caught:
                    escaped.append(verdict.mutant)
        finally:
            pool.shutdown(
                cancel_futures=True
            )  # interrupted: only what runs is waited for
    print(f"{len(mutants) - len(escaped)} of {len(mutants)} caught")
    for mutant in escaped:
        print(f"  {mutant.name}: {mutant.where}: {mutant.forgets}")
    return not escaped


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make mutants")
    parser.add_argument("--only", metavar="NAME", nargs="+", action="extend")
    parser.add_argument("--tests", metavar="PATH", nargs="+", default=[])
    parser.add_argument("--jobs", metavar="N", type=int, default=JOBS)
    parser.add_argument("--timeout", metavar="S", type=float, default=TIMEOUT_S)
    parser.add_argument("--list", action="store_true")
    options = parser.parse_args(arguments)
    unknown = set(options.only or ()) - {mutant.name for mutant in CATALOG}
    if unknown:
        parser.error(f"no mutant is called {', '.join(sorted(unknown))}")
    if options.jobs < 1:
        parser.error("--jobs must be at least 1")
    return options


def main() -> int:
    options = parse_options()
    mutants = [m for m in CATALOG if not options.only or m.name in options.only]
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name}  ({mutant.where})\n    {mutant.forgets}")
        return 0
    try:
        return 0 if run_mutants(options, mutants) else 1
    except KeyboardInterrupt:
        print("interrupted")
        return 1


if __name__ == "__main__":
    sys.exit(main())
