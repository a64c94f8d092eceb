# SPDX-License-Identifier: Apache-2.0
"""Valid and invalid names, UUIDs and minor numbers."""

import errno as errnos

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.dm.names import (
    MINOR_MAX,
    NAME_LENGTH_MAX,
    UUID_LENGTH_MAX,
    check_name,
    check_uuid,
    free_minor,
)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("", "Empty device name"),
        ("n" * (NAME_LENGTH_MAX + 1), "longer than 127 bytes"),
        ("é" * (NAME_LENGTH_MAX // 2 + 1), "longer than 127 bytes"),
        ("a/b", "'a/b' is not allowed"),
        ("..", "'..' is not allowed"),
        ("control", "'control' is not allowed"),
        ("a\nb", "unprintable"),
    ],
)
def test_name_that_is_refused(name: str, reason: str) -> None:
    with pytest.raises(TableError, match=reason):
        check_name(name)


@pytest.mark.parametrize("name", ["a", "n" * NAME_LENGTH_MAX, "a b", "é", "controls"])
def test_name_that_is_taken(name: str) -> None:
    check_name(name)


def test_uuid() -> None:
    check_uuid("u" * UUID_LENGTH_MAX)
    for uuid, reason in (("u" * (UUID_LENGTH_MAX + 1), "128"), ("\x1b", "unprintable")):
        with pytest.raises(TableError, match=reason):
            check_uuid(uuid)


def test_minor_is_the_lowest_free_one_or_the_one_that_is_wanted() -> None:
    assert free_minor(set(), None) == 0
    assert free_minor({0, 1, 3}, None) == 2
    assert free_minor({0}, MINOR_MAX) == MINOR_MAX
    with pytest.raises(TableError, match="minor exists") as caught:
        free_minor({5}, 5)
    assert caught.value.errno == errnos.EBUSY
    for wanted in (-1, MINOR_MAX + 1):
        with pytest.raises(TableError, match="out of range"):
            free_minor(set(), wanted)
