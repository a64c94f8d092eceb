# SPDX-License-Identifier: Apache-2.0
"""Options that a command gets as one value."""

import inspect
from typing import NamedTuple

from nbdtarget.cli.option_group import takes_group


class Pair(NamedTuple):
    one: int
    two: str


NONE = Pair(0, "")


def command(before: int, pair: Pair = NONE, after: bool = False) -> object:
    """Do it."""
    return before, pair, after


def test_options_stand_in_the_place_of_the_group() -> None:
    wrapped = takes_group(command, "pair", {"one": (int, 1), "two": (str, "x")}, Pair)
    parameters = inspect.signature(wrapped).parameters
    assert list(parameters) == ["before", "one", "two", "after"]
    assert parameters["one"].default == 1
    assert wrapped.__doc__ == "Do it."
    assert wrapped(before=5, one=2, two="y", after=True) == (5, Pair(2, "y"), True)  # type: ignore[call-arg]
