# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests and answers: how large they may be, and that a long answer lets the loop have its turns."""

import asyncio
from collections.abc import AsyncIterator

import msgspec
import pytest

from nbdtarget.control import bodies
from nbdtarget.control import messages as m
from nbdtarget.control.bodies import LINES_AT_ONCE, body_bytes_max, encode
from nbdtarget.dm.table import TARGETS_MAX


class Turns:
    """Counts the turns that the loop has."""

    def __init__(self) -> None:
        self.nr = 0
        self._loop = asyncio.get_running_loop()
        self._handle = self._loop.call_soon(self._turn)

    def _turn(self) -> None:
        self.nr += 1
        self._handle = self._loop.call_soon(self._turn)

    def stop(self) -> None:
        self._handle.cancel()


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    it = Turns()
    yield it
    it.stop()


def _device(name: str, nr_lines: int) -> m.DeviceLines:
    lines = [m.TableLine(nr, 1, "zero", f"{nr}", {"nr": nr}) for nr in range(nr_lines)]
    return m.DeviceLines(name, tuple(lines), below=(m.BelowLine("a"),), losses=3)


def _info(name: str) -> m.InfoLine:
    return m.InfoLine(
        name, "", "ACTIVE", False, False, True, False, 0, 0, 253, 0, 1, 4096
    )


def test_the_longest_table_fits() -> None:
    assert body_bytes_max("create") == body_bytes_max("load") >= 64 * TARGETS_MAX
    others = {body_bytes_max(verb) for verb in m.VERBS} - {body_bytes_max("load")}
    assert others == {bodies.OTHER_BODY_BYTES_MAX}


@pytest.mark.parametrize(
    "answer",
    [
        m.Done(("a",)),
        m.LinesAnswer(()),
        m.LinesAnswer((_device("a", 0), _device("b", 1))),
        m.LinesAnswer((_device("a", LINES_AT_ONCE), _device("b", LINES_AT_ONCE + 1))),
        m.LinesAnswer((_device("a", 10 * LINES_AT_ONCE + 7), _device("b", 2))),
        m.LinesAnswer(tuple(_device(f"{nr}", 2) for nr in range(LINES_AT_ONCE))),
        m.InfoAnswer(()),
        m.InfoAnswer(tuple(_info(f"{nr}") for nr in range(2 * LINES_AT_ONCE + 1))),
        m.DevicesAnswer(
            tuple(m.DeviceDeps(f"{nr}", ("x",)) for nr in range(3 * LINES_AT_ONCE))
        ),
    ],
    ids=lambda answer: type(answer).__name__,
)
async def test_pieces_are_what_one_call_would_have_made(answer: m.Answer) -> None:
    encoded = await encode(answer)
    assert encoded == msgspec.json.encode(answer)
    assert msgspec.json.decode(encoded, type=type(answer)) == answer


@pytest.mark.parametrize(
    ("answer", "nr_turns"),
    [
        (m.LinesAnswer((_device("a", 40 * LINES_AT_ONCE),)), 40),
        (m.LinesAnswer(tuple(_device("a", 1) for _ in range(20 * LINES_AT_ONCE))), 40),
        (m.InfoAnswer(tuple(_info("a") for _ in range(30 * LINES_AT_ONCE))), 30),
    ],
)
async def test_the_loop_has_a_turn_after_each_piece(
    turns: Turns, answer: m.Answer, nr_turns: int
) -> None:
    await encode(answer)
    assert turns.nr >= nr_turns


async def test_no_call_of_the_encoder_has_more_than_one_piece(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    longest = 0
    plain = msgspec.json.encode

    def noting(it: object) -> bytes:
        nonlocal longest
        if isinstance(it, tuple | list):
            longest = max(longest, len(it))
        return plain(it)

    monkeypatch.setattr(msgspec.json, "encode", noting)
    devices = tuple(_device(f"{nr}", nr * 100) for nr in range(20))
    assert await encode(m.LinesAnswer(devices)) == plain(m.LinesAnswer(devices))
    assert 0 < longest <= LINES_AT_ONCE
