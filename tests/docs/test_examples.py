# SPDX-License-Identifier: Apache-2.0
"""Every command line in the documentation can be parsed: no page shows an option that is not there."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
import typer

from nbdtarget.cli.app import make_app
from tests.support.reference_pages import DOCS, ROOT

PROGRAM: Final[Any] = typer.main.get_command(make_app())
PAGES: Final = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]
# Typer brings its own click in some versions: its exceptions are reached through Typer.
USAGE_ERROR: Final[Any] = typer.BadParameter.__mro__[1]
# These words begin another command of the shell, or say where output goes.
_ENDS: Final = {"|", "&", ";", ">", "<", "&&", "2>"}


def command_lines(text: str) -> Iterator[list[str]]:
    """The words after `nbdtarget` of each command line in a block of code that is to be typed."""
    text = text.replace("\\\n", " ")
    for line in text.splitlines():
        found = re.match(
            r"(?:    +|\$ |)(?:echo .*\| |while |n=\$\()?nbdtarget (.*)", line
        )
        # A line of prose may begin with the name of the program, but not behind blanks or a prompt.
        if found is None or not line.startswith((" ", "$")):
            continue
        try:
            words = shlex.split(found[1].rstrip(")"), comments=True)
        except ValueError:  # a quoted text that goes on in the next line
            continue
        end = next(
            (nr for nr, word in enumerate(words) if word.rstrip(";") in _ENDS), None
        )
        words = words[:end]
        # A synopsis has words in brackets, an outline has an ellipsis, and a script has variables.
        if words and not any(
            re.search(r"^\[|\]$|…|\.\.\.|^[|{$]", word) for word in words
        ):
            yield words


def parse(words: list[str]) -> None:
    """Parse a command line as the program does. Raises: an error of usage."""
    command, context = (
        PROGRAM,
        PROGRAM.make_context("nbdtarget", [], resilient_parsing=True),
    )
    words = list(words)
    while words and not words[0].startswith("-") and hasattr(command, "commands"):
        name = words.pop(0).rstrip(";")
        assert name in command.commands, f"there is no command {name}"
        command = command.commands[name]
    if not hasattr(command, "commands") and not {"-h", "--help"} & set(words):
        command.make_context(command.name, words, parent=context)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_command_lines_are_understood(page: Path) -> None:
    for words in command_lines(page.read_text()):
        try:
            parse(words)
        except USAGE_ERROR as error:
            message = getattr(error, "format_message", error.__str__)()
            pytest.fail(f"nbdtarget {shlex.join(words)}: {message}")


def test_command_lines_are_found() -> None:
    found = [line for page in PAGES for line in command_lines(page.read_text())]
    assert len(found) > 80
    assert ["metadata", "check", "/srv/disk.img.nbdtarget"] in found
    assert ["cache", "/srv/slow.img", "/srv/fast.img", "--resize"] in found


@pytest.mark.parametrize(
    "line", ["clone a b --hydrate-rate 1M", "frobnicate", "cache a"]
)
def test_wrong_command_line_is_noticed(line: str) -> None:
    with pytest.raises((USAGE_ERROR, AssertionError)):
        parse(line.split())
