# SPDX-License-Identifier: Apache-2.0
"""The oracle itself: it must catch what it is there to catch."""

import pytest

from tests.support.model import SECTOR, DiskModel, Violation

A = b"A" * SECTOR
B = b"B" * SECTOR
ZERO = bytes(SECTOR)


def written(model: DiskModel, data: bytes, *, fua: bool = False) -> None:
    model.end_write(model.start_write(0, data, len(data), "w"), ok=True, fua=fua)


def test_read_must_return_the_newest_value() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    model.check_read(0, A)
    with pytest.raises(Violation, match="sector 0"):
        model.check_read(0, ZERO)


def test_crash_may_lose_an_unflushed_write() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    model.check_survivor(ZERO)
    model.check_survivor(A)


def test_crash_must_keep_a_flushed_write() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    model.end_flush(model.start_flush(), ok=True)
    with pytest.raises(Violation):
        model.check_survivor(ZERO)


def test_flush_promises_nothing_of_a_write_under_way() -> None:
    model = DiskModel(ZERO)
    started = model.start_write(0, A, SECTOR, "w")
    promised = model.start_flush()
    model.end_write(started, ok=True)
    model.end_flush(promised, ok=True)
    model.check_survivor(ZERO)


def test_failed_flush_promises_nothing() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    model.end_flush(model.start_flush(), ok=False)
    model.check_survivor(ZERO)


def test_crash_must_keep_a_fua_write() -> None:
    model = DiskModel(ZERO)
    written(model, A, fua=True)
    with pytest.raises(Violation):
        model.check_survivor(ZERO)


def test_third_value_is_never_allowed() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    with pytest.raises(Violation):
        model.check_survivor(B)


def test_discarded_sector_may_hold_anything_until_written() -> None:
    model = DiskModel(ZERO)
    model.end_write(model.start_write(0, None, SECTOR, "discard"), ok=True)
    model.check_read(0, B)
    written(model, A, fua=True)
    with pytest.raises(Violation):
        model.check_survivor(B)


def test_part_of_a_sector_is_patched() -> None:
    model = DiskModel(ZERO)
    model.end_write(model.start_write(5, b"xy", 2, "w"), ok=True)
    model.check_read(4, b"\0xy\0")
    with pytest.raises(Violation):
        model.check_read(4, b"\0\0\0\0")


def test_failed_write_may_be_seen_or_not() -> None:
    model = DiskModel(ZERO)
    model.end_write(model.start_write(0, A, SECTOR, "w"), ok=False)
    model.check_read(0, A)
    model.check_read(0, ZERO)


def test_part_of_a_survivor_is_held_against_its_own_sectors() -> None:
    model = DiskModel(b"A" * SECTOR + b"B" * SECTOR)
    model.check_survivor(b"B" * SECTOR, SECTOR)
    with pytest.raises(Violation, match="sector 1"):
        model.check_survivor(b"A" * SECTOR, SECTOR)


def test_copy_does_not_know_what_is_promised_later() -> None:
    model = DiskModel(b"A" * SECTOR)
    started = model.start_write(0, b"B" * SECTOR, SECTOR, "b")
    before = model.copy()
    model.end_write(started, ok=True, fua=True)
    before.check_survivor(b"A" * SECTOR)
    with pytest.raises(Violation):
        model.check_survivor(b"A" * SECTOR)


def test_reported_loss_permits_either_value_until_the_next_write() -> None:
    model = DiskModel(ZERO)
    written(model, A)
    model.end_flush(model.start_flush(), ok=True)
    written(model, B)
    model.lose_unflushed()
    model.check_read(0, A)
    model.check_read(0, B)
    with pytest.raises(Violation):
        model.check_read(0, ZERO)  # what was flushed is not lost
    model.end_flush(model.start_flush(), ok=True)
    model.check_survivor(A)  # the write was lost before this FLUSH
    written(model, B)
    with pytest.raises(Violation):
        model.check_read(0, A)


def test_every_change_of_what_may_be_held_is_counted() -> None:
    model = DiskModel(b"A" * SECTOR)
    counted = [model.nr_changes]
    started = model.start_write(0, b"B" * SECTOR, SECTOR, "b")
    counted.append(model.nr_changes)
    model.end_write(started, ok=True)
    counted.append(model.nr_changes)
    model.end_flush(model.start_flush(), ok=True)
    counted.append(model.nr_changes)
    assert counted == sorted(set(counted))
