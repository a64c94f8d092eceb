# SPDX-License-Identifier: Apache-2.0
"""README.md leads to pages that exist, and shows commands, options and make targets that there are."""

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from nbdtarget.cli.app import make_app

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
LINK = re.compile(r"\]\(([^)#:]+)(?:#[^)]*)?\)")
COMMAND = re.compile(r"(?:^ {4}(?:\$ )?|`)nbdtarget ([^`\n]+)", re.MULTILINE)
MAKE = re.compile(r"(?:^ {4}|`)make ([a-z-]+)", re.MULTILINE)


PROGRAM: Any = typer.main.get_command(make_app())


def commands() -> list[str]:
    return [found[1].partition(" # ")[0] for found in COMMAND.finditer(TEXT)]


@pytest.mark.parametrize("target", sorted(set(LINK.findall(TEXT))))
def test_link_leads_to_a_page(target: str) -> None:
    assert (ROOT / target).exists()


@pytest.mark.parametrize("line", commands())
def test_command_and_its_options_exist(line: str) -> None:
    command: Any = PROGRAM
    words = line.split()
    while getattr(command, "commands", None):
        command = command.commands[words.pop(0)]
        if words and words[0] in ("check",):  # `metadata check | info | ...`
            break
    options = {option for each in command.params for option in each.opts}
    for word in words:
        if word.startswith("--"):
            assert word.partition("=")[0] in options, line


def test_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in MAKE.findall(TEXT):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_command_that_runs_the_suite_is_spelled_out() -> None:
    assert re.search(r"^ {4}make test\b", TEXT, re.MULTILINE)
