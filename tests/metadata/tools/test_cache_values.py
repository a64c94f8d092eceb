# SPDX-License-Identifier: Apache-2.0
"""Values of cache blocks are read from records, also from wrong ones."""

import pytest

from nbdtarget_metadata.cache.records import ArenaRecord, SetEntries, SetValues
from nbdtarget_metadata.tools.cache_values import statements

TWO_VALUES = b"\1" + bytes(7) + b"\2" + bytes(7)
ENTRY = b"\5" + bytes(3) + b"\1" + bytes(7)


@pytest.mark.parametrize(
    ("record", "said"),
    {
        "values": (
            SetValues(generation=1, previous=b"", begin=7, values=TWO_VALUES),
            [(7, 1), (8, 2)],
        ),
        "part of a value": (
            SetValues(generation=1, previous=b"", begin=7, values=TWO_VALUES[:-1]),
            [(7, 1)],
        ),
        "values before the first block": (
            SetValues(generation=1, previous=b"", begin=-1, values=TWO_VALUES),
            [],
        ),
        "entries": (
            SetEntries(generation=1, previous=b"", entries=ENTRY),
            [(5, 1)],
        ),
        "part of an entry": (
            SetEntries(generation=1, previous=b"", entries=ENTRY[:-1]),
            [],
        ),
    }.values(),
)
def test_record_says_what_can_be_read_of_it(
    record: ArenaRecord, said: list[tuple[int, int]]
) -> None:
    assert list(statements(record)) == said
