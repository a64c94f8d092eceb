# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.common.units import parse_sectors, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("64K", 65536),
        ("1m", 1 << 20),
        ("2G", 2 << 30),
        ("1TiB", 1 << 40),
        ("3P", 3 << 50),
    ],
)
def test_parse_size_of_what_people_write(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "K", "-1", "1.5G", "1X", "64 K", "4iB", "8E", "9" * 20, "१"]
)
def test_parse_size_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|large"):
        parse_size(text)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("8", 4096),
        ("8s", 4096),
        ("8S", 4096),
        ("8b", 8),
        ("64k", 64 << 10),
        ("1G", 1 << 30),
    ],
)
def test_plain_number_counts_sectors(text: str, size: int) -> None:
    assert parse_sectors(text) == size


@pytest.mark.parametrize("text", ["", "s", "-1", "1.5", "8x", "9" * 21])
def test_parse_sectors_refuses_anything_else(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|large"):
        parse_sectors(text)
