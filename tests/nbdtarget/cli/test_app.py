# SPDX-License-Identifier: Apache-2.0
"""Which modules the program imports: those of the command that was typed.

A start is mostly imports. How long it takes depends on the machine; what is imported does not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import typer

from nbdtarget.cli.app import COMMANDS, make_app
from tests.support.processes import NBDTARGET

# Modules whose import takes 2 ms or more, or is part of such an import: asyncio with ssl 30, cache 25, rich 40, uvloop 10.
HEAVY = {
    "asyncio",
    "hashlib",
    "logging",
    "nbdtarget.control.uncache",
    "nbdtarget.devices.registry",
    "nbdtarget.targets.cache.target",
    "nbdtarget_metadata.cache.metadata",
    "rich",
    "ssl",
    "uvloop",
}
SCRIPT = """
import json, sys
from nbdtarget.cli.app import run
run(json.loads(sys.argv[1]))
print()
print(json.dumps(sorted(sys.modules)))
"""


def imported_by(*words: str) -> set[str]:
    """The modules that a command line imports in a process of its own, also if the command fails."""
    ran = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(words)],
        check=True,
        capture_output=True,
        text=True,
        env={**os.environ, "NBDTARGET_CONTROL": "/nonexistent/control"},
    )
    return set(json.loads(ran.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "words",
    [("status",), ("ls",), ("message", "d", "0", "x"), ("splitname", "vg-lv")],
    ids=" ".join,
)
def test_a_command_that_asks_a_server_imports_nothing_heavy(
    words: tuple[str, ...],
) -> None:
    assert imported_by(*words) & HEAVY == set()


@pytest.mark.parametrize("word", ["--version", "version"])
def test_the_version_tells_of_tls_and_needs_nothing_else(word: str) -> None:
    assert imported_by(word) & HEAVY <= {"ssl"}


def test_a_clone_imports_no_cache() -> None:
    found = imported_by("clone", "/nonexistent/source", "/nonexistent/dest")
    assert "nbdtarget.porcelain.clone" in found
    assert found & HEAVY <= HEAVY - {
        "nbdtarget.control.uncache",
        "nbdtarget.targets.cache.target",
        "nbdtarget_metadata.cache.metadata",
        "rich",
    }


def test_only_the_module_of_the_command_is_imported() -> None:
    found = imported_by("version")
    assert {name for name in COMMANDS if f"nbdtarget.cli.{name}" in found} == {
        "listing",
        "completion",
    }


@pytest.mark.parametrize(
    "words",
    [(), ("--help",), ("help", "ls"), ("nonsense",), ("--nonsense", "status")],
    ids=" ".join,
)
def test_other_words_need_all_commands(words: tuple[str, ...]) -> None:
    found = imported_by(*words)
    assert {name for name in COMMANDS if f"nbdtarget.cli.{name}" in found} == set(
        COMMANDS
    )


@pytest.mark.parametrize("module", COMMANDS)
def test_table_names_the_commands_of_each_module(module: str) -> None:
    program: Any = typer.main.get_command(make_app([module]))
    assert tuple(program.commands) == COMMANDS[module]


def test_a_word_that_is_no_command_is_compared_with_all() -> None:
    ran = subprocess.run(
        [
            *(sys.executable, "-c"),
            "from nbdtarget.cli.app import main; main()",
            "statsu",
        ],
        check=False,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert "status" in ran.stderr


def test_a_disk_whose_name_the_terminal_does_not_have_is_served(
    tmp_path: Path, runtime: Path
) -> None:
    (tmp_path / "dü.img").write_bytes(bytes(512))
    words = ["export", "dü.img", "--name", "d", "--control", f"{tmp_path}/c.sock"]
    with subprocess.Popen(
        [NBDTARGET, *words],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
    ) as process:
        assert process.stdout is not None
        first = process.stdout.readline()
        process.terminate()
        process.stdout.read()
    assert first.startswith(rb"d\xfc.img is served")
    assert process.returncode == 0
