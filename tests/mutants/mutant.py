# SPDX-License-Identifier: Apache-2.0
"""What a mutant is: one wrong order or forgotten step, as a patch of the real source."""

from dataclasses import dataclass
from pathlib import Path

__all__ = ["Edit", "Mutant", "PatchError", "patched"]

Edit = tuple[str, str]  # exact old text, new text


class PatchError(Exception):
    """A mutant does not fit the source it was made for."""


@dataclass(frozen=True)
class Mutant:
    """One deliberate bug.

    Attributes:
        name: in kebab case, as `make mutants` prints it.
        forgets: what is done wrong, and what a user would lose.
        file: the source that is patched, from the top of the tree.
        edits: each old text stands in the file exactly once.
        tests: what must catch it, in the order in which it is run; the cheapest first.
        hangs: it is caught when the tests do not end in time, too.
    """

    name: str
    forgets: str
    file: str
    edits: tuple[Edit, ...]
    tests: tuple[str, ...]
    hangs: bool = False


def patched(mutant: Mutant, root: Path) -> str:
    """Return the text of the mutant's file under `root`, with its edits.

    Raises: PatchError: an old text is not there, or there more than once.
    """
    text = (root / mutant.file).read_text()
    for old, new in mutant.edits:
        count = text.count(old)
        if count != 1:
            line = old.strip().splitlines()[0]
            raise PatchError(
                f"{mutant.name}: {mutant.file} holds {line!r} {count} times, not once"
            )
        text = text.replace(old, new)
    return text
