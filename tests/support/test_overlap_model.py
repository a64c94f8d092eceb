# SPDX-License-Identifier: Apache-2.0
"""The oracle for overlapping writes: either order, one of the two, and it stays."""

import pytest

from tests.support.model import SECTOR, Violation, Write
from tests.support.overlap_model import OverlapModel

OLD = bytes(SECTOR)
A = b"A" * SECTOR
B = b"B" * SECTOR

Started = list[tuple[int, Write]]


def two_at_once(*, fua: bool = False) -> OverlapModel:
    """A and B have been in flight at the same time, and have ended; B with `fua`."""
    model = OverlapModel(OLD)
    first, second = write(model, A), write(model, B)
    model.end_write(second, ok=True, fua=fua)
    model.end_write(first, ok=True)
    return model


def write(model: OverlapModel, data: bytes) -> Started:
    return model.start_write(0, data, SECTOR, data[:1].decode())


def flush(model: OverlapModel) -> None:
    model.end_flush(model.start_flush(), ok=True)


def survive(model: OverlapModel) -> set[bytes]:
    found = set()
    for value in (OLD, A, B):
        try:
            model.check_survivor(value)
        except Violation:
            continue
        found.add(value)
    return found


@pytest.mark.parametrize("seen", [A, B])
def test_either_of_two_may_be_read_and_stays(seen: bytes) -> None:
    model = two_at_once()
    model.check_read(0, seen)
    model.check_read(0, seen)
    with pytest.raises(Violation):
        model.check_read(0, A if seen is B else B)


def test_what_was_there_before_both_is_not_read() -> None:
    with pytest.raises(Violation):
        two_at_once().check_read(0, OLD)


def test_flush_leaves_either_and_nothing_older() -> None:
    model = two_at_once()
    assert survive(model) == {OLD, A, B}
    flush(model)
    assert survive(model) == {A, B}


def test_flush_promises_what_was_seen_before_it() -> None:
    model = two_at_once()
    model.check_read(0, A)
    assert survive(model) == {OLD, A, B}
    flush(model)
    assert survive(model) == {A}


def test_flush_promises_nothing_of_what_is_seen_after_it() -> None:
    model = two_at_once()
    promised = model.start_flush()
    model.check_read(0, A)
    model.end_flush(promised, ok=True)
    assert survive(model) == {A, B}


def test_fua_keeps_the_other_one_possible() -> None:
    model = two_at_once(fua=True)
    assert survive(model) == {A, B}


def test_read_beside_a_write_may_see_either_and_settles_nothing() -> None:
    model = OverlapModel(OLD)
    model.end_write(write(model, A), ok=True)
    started = write(model, B)
    model.check_read(0, B)
    model.check_read(0, A)
    model.end_write(started, ok=True)
    with pytest.raises(Violation):
        model.check_read(0, A)  # B was submitted when A had ended


def test_write_submitted_during_a_read_may_be_seen() -> None:
    model = OverlapModel(OLD)
    read = model.start_read(0, SECTOR)
    model.end_write(write(model, A), ok=True)
    model.end_read(read, 0, A)
