# SPDX-License-Identifier: Apache-2.0
"""The oracle at the client: what it may still be sure of after a power cut."""

import pytest

from tests.sim.model import SECTOR, ClientModel, Violation

OLD = b"o" * SECTOR
NEW = b"n" * SECTOR
TAIL = 3  # bytes of the sector that a ragged write leaves alone


def written(model: ClientModel, data: bytes) -> None:
    model.end_write(model.start_write(0, data, len(data), "w"), ok=True)


def flushed(model: ClientModel) -> None:
    model.end_flush(model.start_flush(), ok=True)


def cut_after_unflushed_write() -> ClientModel:
    """A model after a power cut: the sector has not been read yet, so it may hold OLD or NEW."""
    model = ClientModel(OLD)
    written(model, NEW)
    assert model.is_certain_at(SECTOR - TAIL)
    model.power_off()
    return model


def test_no_part_of_a_sector_is_written_before_somebody_has_looked() -> None:
    # The rest of it would be that of OLD or of NEW: the model knows only one value of a write.
    model = cut_after_unflushed_write()
    assert not model.is_certain_at(SECTOR - TAIL)
    assert model.is_certain_at(SECTOR)
    model.check_survivor_at(0, OLD)
    assert model.is_certain_at(SECTOR - TAIL)
    model.start_write(0, NEW[TAIL:], SECTOR - TAIL, "ragged")
    model.power_off()
    model.check_survivor_at(0, NEW[TAIL:] + OLD[-TAIL:])


@pytest.mark.parametrize("found", [OLD, NEW])
def test_read_may_find_either_before_somebody_has_looked(found: bytes) -> None:
    model = cut_after_unflushed_write()
    model.check_piece(model.start_read(0, SECTOR), 0, found)


def test_flush_does_not_bring_back_what_the_power_cut_took() -> None:
    model = cut_after_unflushed_write()
    flushed(model)
    model.power_off()
    model.check_survivor_at(0, OLD)


def test_power_off_takes_no_promise_back() -> None:
    model = ClientModel(OLD)
    written(model, NEW)
    flushed(model)
    model.power_off()
    assert model.is_certain_at(TAIL)
    running = model.start_read(0, SECTOR)
    with pytest.raises(Violation):
        model.check_piece(running, 0, OLD)
    with pytest.raises(Violation):
        model.check_survivor_at(0, OLD)


def test_flush_after_the_cut_promises_what_was_written_after_it() -> None:
    model = cut_after_unflushed_write()
    later = b"l" * SECTOR
    written(model, later)
    flushed(model)
    model.power_off()
    for lost in (OLD, NEW):
        with pytest.raises(Violation):
            model.check_survivor_at(0, lost)
    model.check_survivor_at(0, later)
