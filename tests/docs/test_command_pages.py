# SPDX-License-Identifier: Apache-2.0
"""The command reference is what `--help` says, for every command, and for no other."""

from pathlib import Path

import pytest
import typer

from nbdtarget.cli.app import make_app
from scripts.command_reference import BEGIN, PAGES, CommandPage, pages, with_reference

COMMANDS = pages()
ADVICE = "run `make docs-reference`"


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_page_says_what_the_help_says(page: CommandPage) -> None:
    assert page.path.exists(), ADVICE
    text = page.path.read_text()
    assert with_reference(text, page) == text, ADVICE


def test_every_page_is_of_a_command() -> None:
    assert {path.stem for path in PAGES.glob("nbdtarget*.md")} == {
        page.name for page in COMMANDS
    }


@pytest.mark.parametrize("page", COMMANDS, ids=lambda page: page.name)
def test_title_of_a_page_is_the_command(page: CommandPage) -> None:
    first, _, _ = page.path.read_text().partition("\n")
    assert first == f"# {' '.join(page.words)}"


def test_hidden_commands_are_named_on_the_page_of_the_program() -> None:
    text = (PAGES / "nbdtarget.md").read_text()
    program = typer.main.get_command(make_app())
    hidden = [name for name, each in program.commands.items() if each.hidden]  # type: ignore[attr-defined]
    assert hidden
    assert [name for name in hidden if f"`{name}`" not in text] == []


def test_page_without_markers_is_refused() -> None:
    page = COMMANDS[0]
    with pytest.raises(ValueError, match="markers"):
        with_reference("# nbdtarget\n", page)


def test_what_is_written_by_hand_stays(tmp_path: Path) -> None:
    page = COMMANDS[0]
    text = page.path.read_text()
    by_hand = text.replace(BEGIN, f"Before.\n\n{BEGIN}") + "\nAfter.\n"
    assert with_reference(by_hand, page) == by_hand
