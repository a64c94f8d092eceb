# SPDX-License-Identifier: Apache-2.0
"""Write the command reference from the command tree: `make docs-reference`.

Each command has a page in docs/reference/commands. Synopsis, description, arguments and options stand between
two markers; this script writes them from what `--help` says. Everything outside of the markers, for example
the examples, is written by hand and stays as it is. A test fails when a page and the command tree differ.
"""

import re
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import typer

__all__ = ["BEGIN", "END", "PAGES", "CommandPage", "pages", "with_reference"]

PAGES: Final = Path(__file__).parent.parent / "docs" / "reference" / "commands"
BEGIN: Final = (
    "<!-- Begin: written by `make docs-reference` from the help texts in nbdtarget/cli. "
    "Do not edit. -->"
)
END: Final = "<!-- End of what `make docs-reference` writes. -->"

_QUOTED: Final = re.compile(r"`([^`'\n]+)'")
_CODE: Final = re.compile(r"(`[^`]*`)")
_OPTION: Final = re.compile(r"(?<![\w`-])(--?[a-z][\w-]*|\$[A-Z][A-Z_]+)(?![\w`])")
_SPECIAL: Final = re.compile(r"([\\*<>\[\]|]|(?<!\w)_|_(?!\w))")


class CommandPage(NamedTuple):
    """One command: `words` as they are typed, and what the tree says about it."""

    words: tuple[str, ...]
    command: Any

    @property
    def name(self) -> str:
        """The name of the page and of the man page."""
        return "-".join(self.words)

    @property
    def path(self) -> Path:
        return PAGES / f"{self.name}.md"

    @property
    def summary(self) -> str:
        """The first paragraph of the help, without its full stop."""
        first = (self.command.help or "").split("\n\n")[0]
        return " ".join(first.split()).removesuffix(".")

    @property
    def plain_summary(self) -> str:
        """The same without marks, for the head of a man page."""
        return _QUOTED.sub(r"\1", self.summary).replace("`", "")


def pages() -> list[CommandPage]:
    """Every command that `--help` lists, groups before what is in them."""
    return list(_walk(_program(), ("nbdtarget",)))


@cache
def _program() -> Any:
    from nbdtarget.cli.app import make_app

    return typer.main.get_command(make_app())


def _walk(command: Any, words: tuple[str, ...]) -> Iterator[CommandPage]:
    yield CommandPage(words, command)
    for name, below in getattr(command, "commands", {}).items():
        if not below.hidden:
            yield from _walk(below, (*words, name))


def with_reference(text: str, page: CommandPage) -> str:
    """The text of a page with the part between the markers as it must be.

    Raises: ValueError: the text has no markers.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page.path}: the markers of `make docs-reference` are gone")
    return f"{before}{BEGIN}\n\n{_reference(page)}\n{END}{after}"


def _reference(page: CommandPage) -> str:
    context = _context(page)
    pieces = " ".join(page.command.collect_usage_pieces(context))
    parts = [
        "## Synopsis",
        f"    {' '.join(page.words)} {pieces.replace('{', '').replace('}', '')}",
        "## Description",
        *(_paragraph(part) for part in (page.command.help or "").split("\n\n")),
    ]
    arguments: list[str] = []
    options: list[str] = []
    for parameter in page.command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None:
            kind = options if record[0].startswith("-") else arguments
            words = (
                record[1].removesuffix("[required]").rstrip() or "See the description."
            )
            kind.append(f"`{record[0]}`\n: {_prose(words)}")
    for title, entries in (("Arguments", arguments), ("Options", options)):
        if entries:
            parts += [f"## {title}", *entries]
    if below := getattr(page.command, "commands", {}):
        parts.append("## Commands")
        parts += [
            f"[`{' '.join(each.words)}`]({each.name}.md)\n: {_prose(each.summary)}."
            for name, command in below.items()
            if not command.hidden
            for each in (CommandPage((*page.words, name), command),)
        ]
    return "\n\n".join(parts) + "\n"


def _context(page: CommandPage) -> Any:
    """Return a context in which a command has all that its `--help` shows: `-h` and the like come from the whole program."""
    program = _program()
    make = page.command.context_class
    parent = make(program, info_name=page.words[0], **program.context_settings)
    if len(page.words) == 1:
        return parent
    return make(page.command, info_name=page.words[-1], parent=parent)


def _paragraph(text: str) -> str:
    """A paragraph of a help text; an example is a command line."""
    label, colon, line = " ".join(text.split()).partition("Example: ")
    return _prose(text) if label or not colon else f"Example:\n\n    {line}"


def _prose(text: str) -> str:
    """A help text as Markdown: words of the program are code, and nothing else is marked up."""
    text = _QUOTED.sub(r"`\1`", " ".join(text.split()))
    pieces = _CODE.split(text)
    pieces[::2] = [
        "".join(
            f"`{piece}`" if nr % 2 else _SPECIAL.sub(r"\\\1", piece)
            for nr, piece in enumerate(_OPTION.split(plain))
        )
        for plain in pieces[::2]
    ]
    return "".join(pieces)


def _new_page(page: CommandPage) -> str:
    return f"# {' '.join(page.words)}\n\n{BEGIN}\n\n{END}\n"


def main() -> int:
    """Rewrite every page; name those that no command has any more."""
    PAGES.mkdir(parents=True, exist_ok=True)
    known = set()
    for page in pages():
        known.add(page.path)
        text = page.path.read_text() if page.path.exists() else _new_page(page)
        page.path.write_text(with_reference(text, page))
    gone = sorted(path for path in PAGES.glob("nbdtarget*.md") if path not in known)
    for path in gone:
        print(
            f"{path}: there is no such command any more: remove the page",
            file=sys.stderr,
        )
    return 1 if gone else 0


if __name__ == "__main__":
    sys.exit(main())
