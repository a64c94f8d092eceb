# SPDX-License-Identifier: Apache-2.0
"""A table line's words, with the kernel's texts."""

import pytest

from nbdtarget.common.errors import ConstructorError
from nbdtarget.targets.clone.table import Options, parse_options, parse_region_size


@pytest.mark.parametrize(("word", "size"), [("8", 4096), ("2097152", 1 << 30)])
def test_region_size_is_in_sectors(word: str, size: int) -> None:
    assert parse_region_size(word, block_size=512) == size


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("", "Invalid region size"),
        ("x", "Invalid region size"),
        ("-8", "Invalid region size"),
        ("0x8", "Invalid region size"),
        ("4", "Invalid region size"),
        ("4194304", "Invalid region size"),
        ("4294967304", "Invalid region size"),
        ("12", "Region size is not a power of 2"),
        ("9", "Region size is not a power of 2"),
        ("8", "Region size is not a multiple of device logical block size"),
    ],
)
def test_bad_region_size_has_the_kernels_text(word: str, text: str) -> None:
    with pytest.raises(ConstructorError) as caught:
        parse_region_size(word, block_size=8192)
    assert caught.value.reason == text


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("", Options()),
        ("0", Options()),
        ("1 no_hydration", Options(hydration=False)),
        ("2 NO_Hydration no_hydration", Options(hydration=False)),
        ("1 no_discard_passdown", Options(discard_passdown=False)),
        ("0 2 hydration_threshold 0", Options(hydration_threshold=0)),
        (
            "0 4 Hydration_Batch_Size 3 hydration_batch_size 5",
            Options(True, True, 1, 5),
        ),
        ("0 0 and what follows", Options()),
        ("1 Hydrate_On_Read", Options(hydrate_on_read=True)),
        ("2 THEN_LINEAR then_linear", Options(then_linear=True)),
        (
            "4 then_linear no_discard_passdown hydrate_on_read no_hydration"
            " 8 hydration_rate 18446744073709551615 event_after_errors 0"
            " hydration_threshold 2 hydration_batch_size 3",
            Options(False, False, 2, 3, True, True, (1 << 64) - 1, 0),
        ),
        ("0 4 HYDRATION_rate 9 hydration_RATE +4", Options(hydration_rate=4)),
    ],
)
def test_options(words: str, options: Options) -> None:
    assert parse_options(words.split()) == options


def test_our_own_words_are_not_counted_among_the_kernels() -> None:
    """A line with all words that the kernel admits may have all of ours as well."""
    words = (
        "5 no_hydration then_linear no_discard_passdown hydrate_on_read THEN_LINEAR"
        " 8 hydration_threshold 2 hydration_batch_size 3 hydration_rate 4"
        " Event_After_Errors 5"
    )
    options = parse_options(words.split())
    assert options.then_linear
    assert options.hydrate_on_read
    assert (options.hydration_rate, options.event_after_errors) == (4, 5)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("3", "Invalid number of feature arguments"),
        ("x", "Invalid number of feature arguments"),
        (
            "5 no_hydration no_hydration no_hydration no_hydration no_hydration",
            "Invalid number of feature arguments",
        ),
        ("1 hydrate_on_reads", "Invalid feature argument"),
        ("0 6" + 3 * " hydration_threshold 1", "Invalid number of core arguments"),
        (
            "0 8" + 3 * " hydration_threshold 1" + " hydration_rate 1",
            "Invalid number of core arguments",
        ),
        (
            "3 no_hydration no_hydration NO_HYDRATION",
            "Invalid number of feature arguments",
        ),
        (
            "4 no_hydration then_linear no_hydration no_discard_passdown",
            "Invalid number of feature arguments",
        ),
        (
            "0 2 hydration_rate 18446744073709551616",
            "Invalid value for argument `hydration_rate'",
        ),
        (
            "0 2 Event_After_Errors 4294967296",
            "Invalid value for argument `event_after_errors'",
        ),
        (
            "0 2 hydration_rate " + 5000 * "9",
            "Invalid value for argument `hydration_rate'",
        ),
        ("2 no_hydration", "Invalid number of feature arguments"),
        ("1 hydration", "Invalid feature argument"),
        ("1 no_hydration trailing", "Invalid number of core arguments"),
        ("0 5", "Invalid number of core arguments"),
        ("0 4 hydration_threshold 1", "Invalid number of core arguments"),
        ("0 1 hydration_threshold", "Number of core arguments must be even"),
        ("0 2 threshold 1", "Invalid core argument"),
        (
            "0 2 hydration_threshold -1",
            "Invalid value for argument `hydration_threshold'",
        ),
        (
            "0 2 hydration_batch_size 4294967296",
            "Invalid value for argument `hydration_batch_size'",
        ),
    ],
)
def test_bad_options_have_the_kernels_text(words: str, text: str) -> None:
    with pytest.raises(ConstructorError) as caught:
        parse_options(words.split())
    assert caught.value.reason == text
