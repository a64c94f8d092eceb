# SPDX-License-Identifier: Apache-2.0
"""The one way in which targets, cache policies and device schemes are registered.

Each of these rooms has a module `registry` that lists what it offers. `by_name` makes it a
dictionary; `NamedLater` is one whose values are imported when they are first asked for. Code that needs one of them by its name, or a list for a help text, asks that dictionary.
How to add one: docs/extending.md.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from typing import TypeVar

__all__ = ["NamedLater", "alternatives", "by_name"]

T = TypeVar("T")


def by_name(items: Iterable[T], name_of: Callable[[T], str]) -> dict[str, T]:
    """Return the items by the name that each has; two of one name are a mistake of ours."""
    named: dict[str, T] = {}
    for item in items:
        name = name_of(item)
        assert name not in named, f"two are registered as {name!r}"
        named[name] = item
    return named


class NamedLater(MutableMapping[str, T]):
    """Values by name, each of which is made by a call when it is first asked for. What the names are costs nothing.

    Args:
        makers: what makes each value.
        name_of: the name that a value itself has; it must be that of its maker.
    """

    def __init__(
        self, makers: Mapping[str, Callable[[], T]], name_of: Callable[[T], str]
    ) -> None:
        self._makers = dict(makers)
        self._name_of = name_of
        self._made: dict[str, T] = {}

    def __getitem__(self, name: str) -> T:
        if name not in self._made:
            value = self._makers[name]()
            assert self._name_of(value) == name, f"{name!r} makes another one"
            self._made[name] = value
        return self._made[name]

    def __setitem__(self, name: str, value: T) -> None:
        self._makers[name] = lambda: value
        self._made[name] = value

    def __delitem__(self, name: str) -> None:
        del self._makers[name]
        self._made.pop(name, None)

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)

    def __contains__(self, name: object) -> bool:
        return name in self._makers


def alternatives(words: Iterable[str]) -> str:
    """Return "a, b or c", for help texts and errors. There must be at least one word."""
    *most, last = words
    return f"{', '.join(most)} or {last}" if most else last
