# SPDX-License-Identifier: Apache-2.0
"""Words: quoting and splitting are each other's inverse."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.common.words import join_words, split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", []),
        (" \t\n", []),
        ("a b", ["a", "b"]),
        ("  a\tb  ", ["a", "b"]),
        (r"a\ b c", ["a b", "c"]),
        (r"a\\b", ["a\\b"]),
        ("a\\", ["a"]),
        (r"\ ", [" "]),
    ],
)
def test_split_words(text: str, words: list[str]) -> None:
    assert split_words(text) == words


@given(st.lists(st.text(min_size=1)))
def test_split_gives_back_what_was_joined(words: list[str]) -> None:
    assert split_words(join_words(words)) == words
