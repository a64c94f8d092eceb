# SPDX-License-Identifier: Apache-2.0
"""A cache table line's words, with the kernel's texts."""

import errno as errnos

import pytest

from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.targets.cache.table import (
    PASSTHROUGH,
    WRITETHROUGH,
    Options,
    parse_block_size,
    parse_core_value,
    parse_options,
    parse_ranges,
)

CONFIG = "Error setting cache policy's config values"
NOTHING: list[tuple[int, int]] = []


@pytest.mark.parametrize(
    ("word", "size"),
    [("64", 32768), ("+128", 65536), ("192", 98304), ("2097152", 1 << 30)],
)
def test_block_size_is_in_sectors_and_a_multiple_of_64(word: str, size: int) -> None:
    assert parse_block_size(word, cache_size=1 << 30) == size


@pytest.mark.parametrize(
    "word",
    ["", "x", "-64", "0x40", "0", "32", "65", "100", "2097216", "4294967360"],
)
def test_bad_block_size_has_the_kernels_text(word: str) -> None:
    with pytest.raises(ConstructorError) as caught:
        parse_block_size(word, cache_size=1 << 40)
    assert caught.value.reason == "Invalid data block size"


def test_block_must_fit_on_the_cache_device() -> None:
    assert parse_block_size("128", cache_size=65536) == 65536
    with pytest.raises(
        ConstructorError, match="larger than the cache device: 65536 bytes"
    ):
        parse_block_size("128", cache_size=65535)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("0 default 0", Options()),
        ("1 writeback smq 0", Options(policy_name="smq")),
        ("1 WriteThrough default 0", Options(mode=WRITETHROUGH)),
        ("1 passthrough default 0", Options(mode=PASSTHROUGH)),
        (
            "3 metadata2 METADATA2 no_discard_passdown default 0",
            Options(metadata2=True, discard_passdown=False),
        ),
        (
            "5 metadata2 dirty_log Sorted_Writeback writethrough no_discard_passdown mq 0",
            Options(WRITETHROUGH, True, False, True, True, "mq"),
        ),
        (
            "0 smq 4 migration_threshold 0 MIGRATION_THRESHOLD 1",
            Options(policy_name="smq", migration_threshold=1),
        ),
        (
            "0 default 4 migration_rate 18446744073709551615 migration_threshold +7",
            Options(migration_threshold=7, migration_rate=(1 << 64) - 1),
        ),
        (
            "0 mq 6 Random_threshold 8 migration_rate 5 sequential_threshold x",
            Options(
                policy_name="mq",
                migration_rate=5,
                policy_config=[
                    ("Random_threshold", "8"),
                    ("sequential_threshold", "x"),
                ],
            ),
        ),
        ("0 default 0 words after these", Options()),
    ],
)
def test_options(words: str, options: Options) -> None:
    assert parse_options(words.split()) == options


@pytest.mark.parametrize(
    ("words", "text"),
    [
        ("", "Invalid number of cache feature arguments"),
        ("x default 0", "Invalid number of cache feature arguments"),
        ("-1 default 0", "Invalid number of cache feature arguments"),
        ("2 writeback", "Invalid number of cache feature arguments"),
        ("6 a b c d e f default 0", "Invalid number of cache feature arguments"),
        (
            "4 metadata2 metadata2 writeback no_discard_passdown smq 0",
            "Invalid number of cache feature arguments",
        ),
        (
            "5 dirty_log metadata2 METADATA2 writeback no_discard_passdown smq 0",
            "Invalid number of cache feature arguments",
        ),
        ("1 fast default 0", "Unrecognised cache feature requested"),
        ("3 writeback writeback fast smq 0", "Unrecognised cache feature requested"),
        (
            "2 writeback writeback smq 0",
            "Duplicate cache io_mode features requested",
        ),
        (
            "2 writeback PASSTHROUGH no-such-policy x",
            "Duplicate cache io_mode features requested",
        ),
        ("1 writeback", "Insufficient args"),
        ("0 no-such-policy", "Invalid number of policy arguments"),
        ("0 no-such-policy x", "Invalid number of policy arguments"),
        ("0 smq 2 migration_threshold", "Invalid number of policy arguments"),
        ("0 smq 1026" + " a 1" * 513, "Invalid number of policy arguments"),
        ("0 SMQ 1 x", "Error creating cache's policy"),
        ("0 no-such-policy 1 x", "Error creating cache's policy"),
        ("0 smq 1 migration_threshold", CONFIG),
        (
            "0 smq 2 migration_threshold -1",
            f"{CONFIG}: bad config value for migration_threshold: -1",
        ),
        (
            "0 smq 2 Migration_Rate 18446744073709551616",
            f"{CONFIG}: bad config value for migration_rate: 18446744073709551616",
        ),
    ],
)
def test_bad_options_have_the_kernels_text(words: str, text: str) -> None:
    with pytest.raises(ConstructorError) as caught:
        parse_options(words.split())
    assert caught.value.reason.startswith(text)
    assert caught.value.errno == errnos.EINVAL
    assert str(caught.value).startswith("cache: ")


def test_policy_takes_as_many_arguments_as_the_kernels() -> None:
    options = parse_options(["0", "smq", "1024", *["key", "1"] * 512])
    assert len(options.policy_config) == 512


@pytest.mark.parametrize("value", ["", "x", "0x1", "1 ", "-0", "1.5", "٣"])
def test_core_value_is_a_number(value: str) -> None:
    with pytest.raises(TableError) as caught:
        parse_core_value("migration_threshold", value)
    assert caught.value.reason == f"bad config value for migration_threshold: {value}"
    assert caught.value.hint == "not a number of sectors"


@pytest.mark.parametrize(("value", "rate"), [("10M", 10 << 20), ("4096", 4096)])
def test_migration_rate_may_be_written_as_a_size(value: str, rate: int) -> None:
    assert parse_core_value("migration_rate", value) == rate
    assert (
        parse_options(["0", "smq", "2", "migration_rate", value]).migration_rate == rate
    )


@pytest.mark.parametrize(
    ("words", "ranges"),
    [
        ("", NOTHING),
        ("5", [(5, 6)]),
        ("0-256", [(0, 256)]),
        ("255 3-4 3", [(255, 256), (3, 4), (3, 4)]),
    ],
)
def test_ranges(words: str, ranges: list[tuple[int, int]]) -> None:
    assert list(parse_ranges(words.split(), 256)) == ranges


@pytest.mark.parametrize(
    ("word", "text"),
    [
        ("0-257", "end cblock out of range: 257 > 256"),
        ("256", "begin cblock out of range: 256 >= 256"),
        ("5-5", "invalid cblock range: 5 >= 5"),
        ("6-5", "invalid cblock range: 6 >= 5"),
        ("x", "invalid cblock range 'x'"),
        ("1-x", "invalid cblock range '1-x'"),
        ("", "invalid cblock range ''"),
        ("-", "invalid cblock range '-'"),
        ("1-", "invalid cblock range '1-'"),
        ("-1", "invalid cblock range '-1'"),
        ("1-2-3", "invalid cblock range '1-2-3'"),
        ("4294967296", "begin cblock out of range: 4294967296 >= 256"),
    ],
)
def test_bad_range_has_the_kernels_text(word: str, text: str) -> None:
    with pytest.raises(TableError) as caught:
        list(parse_ranges([word], 256))
    assert str(caught.value) == text
    assert caught.value.errno == errnos.EINVAL


def test_ranges_before_a_bad_one_are_yielded_first() -> None:
    ranges = parse_ranges(["1", "2-4", "4-9", "0"], 8, "oblock")
    assert [next(ranges), next(ranges)] == [(1, 2), (2, 4)]
    with pytest.raises(TableError, match="end oblock out of range: 9 > 8"):
        next(ranges)
