# SPDX-License-Identifier: Apache-2.0
"""Messages to a mapped device itself, and not to one of its targets: those that begin with `@`."""

from collections.abc import Sequence
from typing import Final, Protocol

from nbdtarget.common.errors import TableError
from nbdtarget.common.units import SECTOR
from nbdtarget.dm.access_trace import AccessTrace
from nbdtarget.dm.statistics import Statistics

__all__ = ["carry_out"]

_ROTATIONAL: Final = {"yes": True, "no": False, "auto": None}


class _Device(Protocol):
    """The parts of a device that the messages change."""

    access_trace: AccessTrace
    deferred_remove: bool
    said_rotational: bool | None
    size: int

    @property
    def statistics(self) -> Statistics: ...


async def carry_out(device: _Device, words: Sequence[str]) -> str | None:
    """Carry out a message, whatever sector it was sent to; the answer to print, or None. Raises: TableError."""
    match words[0].lower():
        case "@cancel_deferred_remove":
            device.deferred_remove = False
        case "@rotational":
            if len(words) != 2 or words[1].lower() not in _ROTATIONAL:
                raise TableError("Invalid argument: expected @rotational yes|no|auto")
            device.said_rotational = _ROTATIONAL[words[1].lower()]
        case verb if verb.startswith("@trace_"):
            return device.access_trace.message(words)
        case verb if verb.startswith("@stats_"):
            return await device.statistics.message(words, device.size // SECTOR)
        case _:
            raise TableError(f"Unsupported message `{words[0]}'")
    return None
