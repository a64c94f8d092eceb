# SPDX-License-Identifier: Apache-2.0
"""The oracle for disks that fail and go on: a loss must be confessed before a FLUSH succeeds."""

import pytest

from tests.support.loss_model import LossModel
from tests.support.model import SECTOR, Violation

OLD = bytes(SECTOR)
A = b"A" * SECTOR


def written() -> LossModel:
    model = LossModel(OLD)
    model.end_write(model.start_write(0, A, SECTOR, "A"), ok=True)
    return model


def flush(model: LossModel, *, ok: bool) -> None:
    model.end_flush(model.start_flush(), ok=ok)


def test_flush_that_succeeds_first_promises_the_write() -> None:
    model = written()
    flush(model, ok=True)
    with pytest.raises(Violation):
        model.check_survivor(OLD)


def test_flush_after_one_that_failed_does_not_promise_what_that_one_lost() -> None:
    model = written()
    flush(model, ok=False)
    flush(model, ok=True)
    model.check_survivor(OLD)
    model.check_survivor(A)


def test_flush_in_flight_beside_one_that_fails_promises_nothing() -> None:
    model = written()
    promised = model.start_flush()
    flush(model, ok=False)
    model.end_flush(promised, ok=True)
    model.check_survivor(OLD)


def test_what_is_read_after_a_restart_is_promised_by_the_next_flush() -> None:
    model = written()
    model.doubt()
    model.observe(A)
    model.check_survivor(OLD)  # a power cut before that flush
    flush(model, ok=True)
    with pytest.raises(Violation):
        model.check_survivor(OLD)


def test_restart_may_not_show_what_never_was() -> None:
    model = written()
    model.doubt()
    with pytest.raises(Violation):
        model.observe(b"X" * SECTOR)
