# SPDX-License-Identifier: Apache-2.0
"""The names on the pages of the reference, and the names in the source."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

__all__ = ["DOCS", "PACKAGE", "ROOT", "dictionary_keys", "matched_words", "words_of"]

ROOT: Final = Path(__file__).parent.parent.parent
DOCS: Final = ROOT / "docs"
PACKAGE: Final = ROOT / "nbdtarget"

_CODE: Final = re.compile(r"`([^`\n]+)`")
_FUNCTION: Final = re.compile(r"\bdef (\w+)")
_WORD: Final = re.compile(r"[^\s,|()…\[\]]+")


def words_of(*pages: str) -> set[str]:
    """Every word that stands in code type on these pages."""
    texts = ((DOCS / page).read_text() for page in pages)
    codes = (code for text in texts for code in _CODE.findall(text))
    return {word for code in codes for word in _WORD.findall(code)}


def matched_words(folder: str, is_wanted: Callable[[str], bool]) -> dict[str, set[str]]:
    """The words that functions of a folder compare something with, by the name of the file.

    Args: is_wanted: given the name of a function, whether it takes words from a user.
    """
    found: dict[str, set[str]] = {}
    for path, function in _functions(folder, is_wanted):
        words = found.setdefault(str(path.relative_to(PACKAGE)), set())
        for node in ast.walk(function):
            if isinstance(node, ast.MatchValue | ast.Compare):
                words |= _constants(node)
    return found


def dictionary_keys(folder: str, function_name: str) -> dict[str, set[str]]:
    """The keys of the dictionaries that functions of this name make, by the name of the file."""
    found: dict[str, set[str]] = {}
    for path, function in _functions(folder, function_name.__eq__):
        name = str(path.relative_to(PACKAGE))
        keys = found.get(name, set())
        for node in ast.walk(function):
            if isinstance(node, ast.Dict):
                keys = keys.union(*map(_constants, filter(None, node.keys)))
            elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
                keys |= _constants(node.slice)
        found[name] = keys
    return found


def _functions(
    folder: str, is_wanted: Callable[[str], bool]
) -> Iterator[tuple[Path, ast.AST]]:
    for path in sorted((PACKAGE / folder).rglob("*.py")):
        text = path.read_text()
        if not any(map(is_wanted, _FUNCTION.findall(text))):
            continue  # parsing takes long, and most files have none
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and is_wanted(
                node.name
            ):
                yield path, node


def _constants(node: ast.AST) -> set[str]:
    return {
        each.value
        for each in ast.walk(node)
        if isinstance(each, ast.Constant) and isinstance(each.value, str) and each.value
    }
