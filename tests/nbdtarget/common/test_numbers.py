# SPDX-License-Identifier: Apache-2.0
"""Whole numbers, and what is none."""

import pytest

from nbdtarget.common.numbers import maybe_number


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0", 0), ("10", 10), ("0010", 10), ("0" * 5000 + "7", 7)],
    ids=["zero", "most", "leading", "many zeroes"],
)
def test_numbers(text: str, expected: int) -> None:
    assert maybe_number(text, 10) == expected


@pytest.mark.parametrize(
    "text",
    ["", "11", "-1", "+1", " 1", "1_0", "x", "²", "٣", "9" * 5000],
    ids=lambda text: ascii(text)[:9],
)
def test_what_is_none(text: str) -> None:
    assert maybe_number(text, 10) is None
