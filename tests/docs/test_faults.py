# SPDX-License-Identifier: Apache-2.0
"""The messages that the page on faults explains are messages of the program, in its words."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.reference_pages import DOCS, PACKAGE, ROOT

PAGE = (DOCS / "faults.md").read_text()
# Texts in the first column of the page's tables that are longer than a word or two.
QUOTED = [
    message
    for line in PAGE.splitlines()
    if line.startswith("| ")
    for message in re.findall(r"`([^`]+)`", line.split(" | ")[0])
    if message.count(" ") > 2 and not message.startswith("nbdtarget ")
]


def literals(path: Path) -> Iterator[str]:
    """The texts in a module, with `…` for what is filled in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(
                str(part.value) if isinstance(part, ast.Constant) else "…"
                for part in node.values
            )
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield re.sub(r"%[a-z]", "…", node.value)


@cache
def texts() -> str:
    folders = (PACKAGE, ROOT / "metadata/nbdtarget_metadata")
    paths = [path for folder in folders for path in folder.rglob("*.py")]
    return "\n".join(text for path in paths for text in literals(path))


@pytest.mark.parametrize("message", QUOTED)
def test_message_is_what_the_program_says(message: str) -> None:
    # The page names an example of what the program fills in.
    pieces = re.split(r"…|\b(?:origin|write)\b", message)
    missing = [piece for piece in pieces if piece.strip(" :,;") not in texts()]
    assert missing == []


def test_messages_are_found_on_the_page() -> None:
    assert len(QUOTED) > 5
