# SPDX-License-Identifier: Apache-2.0
"""Pins: which answers prove another image, which prove nothing, and what metadata records of them."""

import pytest

from nbdtarget.devices.identity import URL
from nbdtarget.devices.ranged.pin import Pin
from nbdtarget_metadata.disks import Evidence, Verdict, compare, record_of

STRONG = Pin(100, '"a"', "Mon")
WEAK = Pin(100, 'W/"a"', "Mon")
DATED = Pin(100, "", "Mon")


@pytest.mark.parametrize(
    ("pin", "found", "says"),
    [
        (STRONG, STRONG, ""),
        (STRONG, Pin(101, '"a"', "Mon"), "its size is 101 bytes, not 100"),
        (STRONG, Pin(100, '"b"', "Mon"), 'its etag is "b", not "a"'),
        (STRONG, Pin(100, '"a"', "Tue"), ""),  # a strong ETag proves equal bytes
        (STRONG, Pin(100, "", "Mon"), ""),
        (STRONG, Pin(100, 'W/"a"', "Mon"), ""),
        (STRONG, Pin(100, 'W/"b"', "Mon"), 'its etag is W/"b", not "a"'),
        (WEAK, Pin(100, 'W/"a"', "Tue"), "its last-modified is Tue, not Mon"),
        (WEAK, Pin(100, 'W/"b"', "Mon"), 'its etag is W/"b", not W/"a"'),
        (DATED, Pin(100, '"a"', "Mon"), ""),
        (
            Pin(100, '"a"', "", "v1"),
            Pin(100, '"a"', "", "v2"),
            "its version is v2, not v1",
        ),
        (Pin(100), Pin(100, '"z"', "Fri"), ""),
    ],
    ids=range(12),
)
def test_difference(pin: Pin, found: Pin, says: str) -> None:
    assert pin.difference(found) == says


def test_what_is_not_told_any_more_proves_nothing() -> None:
    assert STRONG.missing(Pin(100)) == "etag"
    assert WEAK.missing(Pin(100, 'W/"a"')) == "last-modified"
    assert DATED.missing(DATED) == STRONG.missing(STRONG) == ""


def test_weak_form_of_a_strong_etag_proves_nothing() -> None:
    assert STRONG.missing(Pin(100, 'W/"a"', "Mon")) == "etag"
    assert WEAK.missing(WEAK) == ""


def test_strength() -> None:
    assert STRONG.is_strong
    assert Pin(1, version="v").is_strong
    assert not WEAK.is_strong
    assert not DATED.is_strong
    assert Pin(1).is_size_only
    assert STRONG.only_size() == Pin(100)


def compared(recorded: Pin, found: Pin, *, sample: bool | None = None) -> Verdict:
    def evidence(pin: Pin) -> Evidence:
        return Evidence(URL, "https://h/a", 512, pin.ids("https://h/a"))

    return compare(
        record_of("source", evidence(recorded)),
        evidence(found),
        uuid=b"u" * 16,
        generation=1,
        is_sample_equal=sample,
    ).verdict


def test_recorded_pin_is_compared_at_the_next_start() -> None:
    assert compared(STRONG, STRONG) is Verdict.SAME
    assert compared(DATED, DATED) is Verdict.SAME
    # Equal samples prove nothing: two images that were built from one template have many blocks in common.
    assert compared(STRONG, Pin(100, '"b"', "Mon"), sample=True) is Verdict.OTHER
    assert compared(STRONG, Pin(101, '"a"', "Mon"), sample=True) is Verdict.OTHER
    assert compared(DATED, Pin(100, "", "Tue"), sample=True) is Verdict.OTHER
    assert compared(STRONG, Pin(100), sample=True) is Verdict.MOVED  # it tells less


def test_long_validators_are_recorded_whole() -> None:
    long = '"' + "x" * 300
    assert compared(Pin(1, long + 'a"'), Pin(1, long + 'a"')) is Verdict.SAME
    assert compared(Pin(1, long + 'a"'), Pin(1, long + 'b"')) is Verdict.OTHER
    assert compared(Pin(1, '"a' + long), Pin(1, '"b' + long)) is Verdict.OTHER


def test_other_address_of_the_same_pin_is_a_disk_that_moved() -> None:
    found = Evidence(URL, "https://g/a", 512, STRONG.ids("https://g/a"))
    recorded = record_of(
        "source", Evidence(URL, "https://h/a", 512, STRONG.ids("https://h/a"))
    )
    told = compare(recorded, found, uuid=b"u" * 16, generation=1)
    assert told.verdict is Verdict.MOVED
    assert told.reason == "its url is https://g/a, not https://h/a"
