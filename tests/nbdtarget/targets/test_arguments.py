# SPDX-License-Identifier: Apache-2.0
"""Numbers and groups of words, as the kernel reads them."""

import pytest

from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.arguments import (
    UINT64_MAX,
    parse_sectors,
    parse_uint,
    parse_uint32,
    read_group,
)


@pytest.mark.parametrize(
    ("word", "number"),
    [
        ("0", 0),
        ("18446744073709551615", UINT64_MAX),
        ("18446744073709551616", None),
        ("000", 0),
        (5000 * "0" + "7", 7),
        (5000 * "9", None),
        ("", None),
        ("+7", None),
        ("-7", None),
        ("0x7", None),
        ("7 ", None),
        (
            "\u0667",
            None,
        ),  # ARABIC-INDIC DIGIT SEVEN: `int` takes it, the kernel does not
        ("\u00b2", None),  # SUPERSCRIPT TWO
    ],
)
def test_digits_only(word: str, number: int | None) -> None:
    assert parse_uint(word, UINT64_MAX) == number


@pytest.mark.parametrize(
    ("word", "number"),
    [("7", 7), ("+7", 7), ("++7", None), ("+", None), ("4294967296", None)],
)
def test_a_plus_sign_where_the_kernel_takes_one(word: str, number: int | None) -> None:
    assert parse_uint32(word) == number


def test_sectors_are_bounded_by_bytes_of_63_bits() -> None:
    assert parse_sectors(str((1 << 63) // 512)) == (1 << 63) // 512
    assert parse_sectors(str((1 << 63) // 512 + 1)) is None


def test_a_group_ends_where_its_count_says() -> None:
    assert read_group(["2", "a", "b", "c"], 9, "bad", "dust") == (["a", "b"], ["c"])
    assert read_group(["0"], 9, "bad", "dust") == ([], [])


@pytest.mark.parametrize("words", ["", "x", "-1", "+1 a", "2 a", "3 a b c"])
def test_a_wrong_count_is_refused_with_the_kernels_text(words: str) -> None:
    with pytest.raises(ConstructorError, match="bad") as caught:
        read_group(words.split(), 2, "bad", "dust")
    assert caught.value.target == "dust"
