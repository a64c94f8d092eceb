# SPDX-License-Identifier: Apache-2.0
"""`Mutant`: a patch of the real source that plants one wrong order or forgets one step.

Theory of operation

A mutant names the code that it patches by symbol, and not by file and line: a dotted module,
or a module and a qualified name within it, with a colon between the two. For example
`nbdtarget.targets.committer:Committer.commit` is a method, `nbdtarget.bio:_FLAGS` a constant,
and `nbdtarget.bio` alone the whole module. So code may move within its module, and lines may
be added above it, without any mutant noticing. A module that moves is one word to change.

The old text of an edit stands exactly once in the source of that symbol. The source of a
function or a class begins with its first decorator, and consists of whole lines.
"""

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Final

__all__ = ["ROOTS", "Edit", "Mutant", "PatchError", "patched", "path_of", "symbols"]

Edit = tuple[str, str]  # exact old text, new text

# Where Python finds modules: the folders of `pythonpath` in pyproject.toml.
ROOTS: Final = ("", "protocol", "metadata")


class PatchError(Exception):
    """A mutant does not fit the source it was made for."""


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug.

    Attributes:
        name: in kebab case, as `make mutants` prints it.
        forgets: what is done wrong, and what a user would lose.
        where: the symbol that is patched: `module`, or `module:Class.method`.
        edits: each old text stands in the symbol's source exactly once.
        tests: what must catch it, in the order in which it is run; the cheapest first.
        hangs: it is caught when the tests do not end in time, too.
    """

    name: str
    forgets: str
    where: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    hangs: bool = False

    @property
    def module(self) -> str:
        """The dotted name of the module that is patched."""
        return self.where.partition(":")[0]

    @property
    def symbol(self) -> str:
        """The qualified name within the module; empty: all of the module."""
        return self.where.partition(":")[2]


def path_of(module: str, root: Path) -> Path:
    """Return the file of a dotted module in the tree at `root`.

    Raises: PatchError: there is no such module.
    """
    relative = module.replace(".", "/")
    for base in ROOTS:
        for path in (
            root / base / f"{relative}.py",
            root / base / relative / "__init__.py",
        ):
            if path.is_file():
                return path
    raise PatchError(f"there is no module {module}")


def _definitions(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.stmt]]:
    for child in ast.iter_child_nodes(node):
        match child:
            case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef():
                yield prefix + child.name, child
                yield from _definitions(child, f"{prefix}{child.name}.")
            case ast.Assign(targets=[ast.Name(id=name)]):
                yield prefix + name, child
            case ast.AnnAssign(target=ast.Name(id=name)):
                yield prefix + name, child
            case ast.stmt() | ast.excepthandler() | ast.match_case():
                yield from _definitions(child, prefix)


@lru_cache(maxsize=512)
def symbols(text: str) -> dict[str, tuple[int, int]]:
    """Return where each function, class and constant of a module begins and ends.

    The numbers are offsets of whole lines in `text`. Of a name that is defined more than once
    (for example a property and its setter) all the lines between the first and the last count.
    """
    offsets = [0]
    for line in text.splitlines(keepends=True):
        offsets.append(offsets[-1] + len(line))
    found: dict[str, tuple[int, int]] = {}
    for name, node in _definitions(ast.parse(text), ""):
        decorators = getattr(node, "decorator_list", [])
        first = min(each.lineno for each in (node, *decorators)) - 1
        assert node.end_lineno is not None
        begin, end = offsets[first], offsets[node.end_lineno]
        known = found.get(name, (begin, end))
        found[name] = (min(begin, known[0]), max(end, known[1]))
    return found


def _other_places(symbol: str, root: Path) -> str:
    """Return the modules that have a symbol of that name now, for an error message."""
    places = []
    for base in ROOTS:
        for package in (root / base).glob("nbdtarget*"):
            for path in sorted(package.rglob("*.py")):
                if symbol in symbols(path.read_text()):
                    dotted = path.relative_to(root / base).with_suffix("")
                    places.append(f"{str(dotted).replace('/', '.')}:{symbol}")
    return f"; there is {' and '.join(places)}" if places else ""


def _span(mutant: Mutant, text: str, root: Path) -> tuple[int, int]:
    """Return where the symbol of `mutant` begins and ends in the module's text."""
    if not mutant.symbol:
        return 0, len(text)
    span = symbols(text).get(mutant.symbol)
    if span is None:
        raise PatchError(
            f"{mutant.name}: {mutant.module} has no {mutant.symbol}"
            f"{_other_places(mutant.symbol, root)}"
        )
    return span


def patched(mutant: Mutant, root: Path) -> str:
    """Return the text of the mutant's module under `root`, with its edits.

    Raises: PatchError: the symbol is gone, or does not hold an old text exactly once.
    """
    try:
        text = path_of(mutant.module, root).read_text()
    except PatchError as error:
        raise PatchError(
            f"{mutant.name}: {error}{_other_places(mutant.symbol, root)}"
        ) from None
    begin, end = _span(mutant, text, root)
    source = text[begin:end]
    for old, new in mutant.edits:
        count = source.count(old)
        if count != 1:
            line = old.strip().splitlines()[0]
            raise PatchError(
                f"{mutant.name}: {mutant.where} holds {line!r} {count} times, not once"
            )
        source = source.replace(old, new)
    return text[:begin] + source + text[end:]
