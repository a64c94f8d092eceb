# SPDX-License-Identifier: Apache-2.0
"""The one way of registering, and the three registries that use it."""

from collections.abc import Mapping

import pytest

from nbdtarget.common.named import NamedLater, alternatives, by_name
from nbdtarget.devices.registry import SCHEMES
from nbdtarget.policies.registry import POLICY_TYPES
from nbdtarget.targets.registry import TARGET_TYPES


def test_items_are_found_by_the_name_that_each_has() -> None:
    assert by_name(("Bb", "Aa"), str.lower) == {"bb": "Bb", "aa": "Aa"}


def test_two_items_of_one_name_are_refused() -> None:
    with pytest.raises(AssertionError, match="two are registered as 'a'"):
        by_name(("a", "A"), str.lower)


@pytest.mark.parametrize(
    ("words", "text"),
    [(["a"], "a"), (["a", "b"], "a or b"), (["a", "b", "c"], "a, b or c")],
)
def test_alternatives(words: list[str], text: str) -> None:
    assert alternatives(words) == text


@pytest.mark.parametrize(
    ("registry", "names"),
    [
        (SCHEMES, {"", "memory", "nbd", "nbd+unix"}),
        (POLICY_TYPES, {"smq", "mq", "cleaner"}),
        (TARGET_TYPES, {"linear", "clone", "cache", "zero"}),
    ],
)
def test_registries_have_what_the_documents_promise(
    registry: Mapping[str, object], names: set[str]
) -> None:
    assert names <= registry.keys()


def test_values_are_made_when_they_are_asked_for_and_once() -> None:
    made: list[str] = []

    def make(name: str) -> str:
        made.append(name)
        return name

    named = NamedLater({"a": lambda: make("a"), "b": lambda: make("b")}, str)
    assert ("b" in named, "c" in named, sorted(named), len(named)) == (
        *(True, False),
        ["a", "b"],
        2,
    )
    assert made == []
    assert (named["b"], named["b"], named.get("c")) == ("b", "b", None)
    assert made == ["b"]
    assert dict(named) == {"a": "a", "b": "b"}


def test_a_value_that_has_another_name_is_a_mistake() -> None:
    named = NamedLater({"a": lambda: "b"}, str)
    with pytest.raises(AssertionError, match="'a' makes another one"):
        named["a"]


def test_a_value_can_be_replaced_and_removed() -> None:
    named = NamedLater({"a": lambda: "a"}, str)
    named["a"] = "other"
    named["b"] = "b"
    assert (named["a"], named["b"]) == ("other", "b")
    del named["a"], named["b"]
    assert not named
