# SPDX-License-Identifier: Apache-2.0
"""The one way of registering, and the three registries that use it."""

from collections.abc import Mapping

import pytest

from nbdtarget.common.named import alternatives, by_name
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
