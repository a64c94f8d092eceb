# SPDX-License-Identifier: Apache-2.0
"""The rules of metadata operations that the caller who carries them out may rely on."""

import pytest

from nbdtarget_metadata.operations import (
    Flush,
    Read,
    Steps,
    Write,
    read,
    without_flushes,
)


def test_read_asks_for_what_it_was_told() -> None:
    assert read(4096, 2).send(None) == Read(4096, 2)


def test_read_answers_with_a_view() -> None:
    steps = read(0, 2)
    next(steps)
    with pytest.raises(StopIteration) as stop:
        steps.send(bytearray(b"ab"))
    assert stop.value.value == b"ab"


@pytest.mark.parametrize("answer", [None, (b"ab",), b"a"])
def test_read_refuses_a_wrong_answer(
    answer: bytes | tuple[bytes, ...] | None,
) -> None:
    steps = read(0, 2)
    next(steps)
    with pytest.raises(AssertionError):
        steps.send(answer)


def test_flush_equals_a_pause_but_is_told_apart_by_type() -> None:
    # Why owners look at the type first.
    assert Flush() == ()
    assert not isinstance((), Flush)


def write_and_flush(closed: list[str]) -> Steps[str]:
    try:
        yield Write(0, b"a", fua=False)
        yield Flush()
        answer = yield Read(0, 1)
        return f"read {answer!r}"
    finally:
        closed.append("closed")


def test_steps_without_their_flushes_do_everything_else() -> None:
    closed: list[str] = []
    steps = without_flushes(write_and_flush(closed))
    assert steps.send(None) == Write(0, b"a", fua=False)
    assert steps.send(None) == Read(0, 1)
    with pytest.raises(StopIteration) as stop:
        steps.send(b"a")
    assert stop.value.value == "read b'a'"
    assert closed == ["closed"]


def test_steps_without_their_flushes_are_closed_with_their_caller() -> None:
    closed: list[str] = []
    steps = without_flushes(write_and_flush(closed))
    steps.send(None)
    steps.close()
    assert closed == ["closed"]
