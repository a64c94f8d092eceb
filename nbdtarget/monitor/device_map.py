# SPDX-License-Identifier: Apache-2.0
"""`device_map`: what of a clone is copied, or what of a disk is cached, in so many cells from its beginning to its end.

It asks as an NBD client would that reads the metadata contexts of the device. Of each cell at most LOOK_BYTES are looked at, from its
beginning on, so that the map of the largest disk takes no longer than a client waits; and between two cells the loop has its turn.
"""

import errno as errnos
from collections.abc import Callable
from typing import Final

from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.control.figures import MapAnswer
from nbdtarget.dm.mapped_device import MappedDevice, State

__all__ = ["device_map"]

CELLS_MAX: Final = 4096
LOOK_BYTES: Final = 16 << 20
CELL_MIN: Final = 4096  # bytes; a smaller disk has fewer cells
SHARE: Final = 255  # of a cell that is all in one state
# By context: the value of each state (see the modules `extents` of the targets), and its name.
_STATES: Final = {
    "hydration": ((0, "copied"), (1, "source"), (3, "copying")),
    "cache": ((0, "origin"), (1, "cached"), (3, "dirty")),
}


async def device_map(device: MappedDevice, nr_cells: int) -> MapAnswer:
    """Return the map. Raises: TableError: it is suspended, has no such targets, or `nr_cells` is not possible."""
    if not 1 <= nr_cells <= CELLS_MAX:
        raise TableError(f"Invalid argument: 1 to {CELLS_MAX} cells")
    context = next((each for each in device.contexts if each in _STATES), None)
    if context is None or not device.size:
        raise TableError("it has neither a clone nor a cache", errnos.EOPNOTSUPP)
    states = _STATES[context]
    places = {value: nr for nr, (value, _) in enumerate(states)}
    cell_bytes = max(CELL_MIN, -(-device.size // nr_cells))
    cell_bytes = -(-cell_bytes // CELL_MIN) * CELL_MIN
    cells: list[tuple[int, ...]] = []
    totals = [0] * len(states)
    size = device.size
    for begin in range(0, size, cell_bytes):
        if device.size != size:
            raise TableError(
                "Device or resource busy: its table was replaced", errnos.EBUSY
            )
        length = min(cell_bytes, size - begin)
        found = await _cell(device, context, begin, min(length, LOOK_BYTES), places.get)
        looked_at = sum(found)
        for nr, nr_bytes in enumerate(found):
            totals[nr] += nr_bytes * length // looked_at
        cells.append(tuple(SHARE * nr_bytes // looked_at for nr_bytes in found))
        await sleep(0)
    return MapAnswer(
        states=tuple(name for _, name in states),
        cell_bytes=cell_bytes,
        cells=tuple(cells),
        totals=tuple(totals),
        is_sampled=cell_bytes > LOOK_BYTES,
    )


async def _cell(
    device: MappedDevice,
    context: str,
    begin: int,
    length: int,
    place: Callable[[int], int | None],
) -> list[int]:
    """Return how many bytes of a range are in which state."""
    found = [0, 0, 0]
    at, end = begin, begin + length
    while at < end:
        if device.state is not State.ACTIVE:
            raise TableError("Device or resource busy: it is suspended", errnos.EBUSY)
        try:
            extents = await device.context_extents(context, at, end - at)
        except DeviceError as error:
            raise TableError(f"Input/output error: {error}", error.errno) from None
        for extent in extents:
            nr = place(extent.flags)
            assert nr is not None, "a state that this context does not have"
            found[nr] += extent.length
            at += extent.length
    return found
