# SPDX-License-Identifier: Apache-2.0
"""Long tables: reading, constructing and showing one lets the loop have its turns."""

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.control import messages as m
from nbdtarget.control.verbs import Verbs
from nbdtarget.dm import registry as module
from nbdtarget.dm.registry import PARSED_AT_ONCE_MAX, Registry
from nbdtarget.dm.table import TARGETS_AT_ONCE, TargetSpec, parse_table
from nbdtarget.targets.base import Target
from tests.support.dm import make_registry

NR = 20 * TARGETS_AT_ONCE
LONG = "".join(f"{nr} 1 zero\n" for nr in range(NR))


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

    def since(self) -> int:
        """How many turns there were since the last time."""
        nr, self.nr = self.nr, 0
        return nr


@pytest.fixture
async def turns() -> AsyncIterator[Turns]:
    it = Turns()
    yield it
    it.stop()


@pytest.fixture
async def registry() -> AsyncIterator[Registry]:
    registry, _ = make_registry(a=8192)
    yield registry
    await registry.close()


async def test_the_loop_has_turns(registry: Registry, turns: Turns) -> None:
    verbs = Verbs(registry)
    turns.since()
    await registry.create("long", LONG)
    assert turns.since() >= 20
    shown = await verbs.table(m.Table())
    assert turns.since() >= 20
    status = await verbs.status(m.Status())
    assert turns.since() >= 20
    (device,) = shown.devices
    assert [(line.start, line.type) for line in device.lines] == [
        (nr, "zero") for nr in range(NR)
    ]
    assert len(status.devices[0].lines) == NR
    assert registry.get("long").table() == [(nr, 1, "zero", "") for nr in range(NR)]


@pytest.mark.parametrize("is_long", [False, True])
async def test_only_a_long_table_is_read_in_a_thread(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, is_long: bool
) -> None:
    readers: list[threading.Thread] = []

    def noting(text: str, types: Mapping[str, type[Target]]) -> tuple[TargetSpec, ...]:
        readers.append(threading.current_thread())
        return parse_table(text, types)

    monkeypatch.setattr(module, "parse_table", noting)
    comment = "# " + "x" * (PARSED_AT_ONCE_MAX if is_long else 10)
    await registry.create("disk", f"{comment}\n0 8 zero\n")
    (reader,) = readers
    assert (reader is threading.main_thread()) != is_long
    assert registry.get("disk").table() == [(0, 8, "zero", "")]


async def test_a_mistake_in_a_long_table_is_told_and_leaves_no_device(
    registry: Registry,
) -> None:
    with pytest.raises(TableError, match="Gap in table: line 5121"):
        await registry.create("long", LONG + f"{NR + 1} 1 zero\n" + " " * (1 << 16))
    assert registry.devices() == []


async def test_a_device_that_is_removed_while_its_table_is_read(
    registry: Registry,
) -> None:
    await registry.create("disk", "0 8 zero")
    load = asyncio.create_task(registry.load("disk", LONG + "#" * (1 << 16)))
    await asyncio.sleep(0)
    await registry.remove("disk")
    with pytest.raises(TableError):
        await load
