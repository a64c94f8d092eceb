# SPDX-License-Identifier: Apache-2.0
"""The one way in which targets, cache policies and device schemes are registered.

Each of these rooms has a module `registry` with one tuple of what it offers. `by_name` makes it a
dictionary. Code that needs one of them by its name, or a list for a help text, asks that dictionary.
How to add one: docs/extending.md.
"""

from collections.abc import Callable, Iterable
from typing import TypeVar

__all__ = ["alternatives", "by_name"]

T = TypeVar("T")


def by_name(items: Iterable[T], name_of: Callable[[T], str]) -> dict[str, T]:
    """Return the items by the name that each has; two of one name are a mistake of ours."""
    named: dict[str, T] = {}
    for item in items:
        name = name_of(item)
        assert name not in named, f"two are registered as {name!r}"
        named[name] = item
    return named


def alternatives(words: Iterable[str]) -> str:
    """Return "a, b or c", for help texts and errors. There must be at least one word."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
