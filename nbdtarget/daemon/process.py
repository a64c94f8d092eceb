# SPDX-License-Identifier: Apache-2.0
"""The process of a server: its event loop, and whether it must be left without waiting.

Python waits for tasks and for threads before it ends. A thread that hangs in a system call would never let it
end, so `Daemon` notes here what hangs, and `nbdtarget.cli.app` then leaves the process by `os._exit`.
"""

import asyncio
import ctypes
import gc
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from nbdtarget.common.collector import look_as_usual
from nbdtarget.server.admission import raise_descriptor_limit

__all__ = [
    "forget_what_hangs",
    "give_memory_back",
    "must_leave_at_once",
    "note_what_hangs",
    "run",
]

T = TypeVar("T")

# Of glibc's malloc.h, and bytes. Without them each large piece that is freed makes larger ones stay in the heap, where a small
# one behind them keeps the memory from going back to the kernel: 1 GiB of half-sent WRITEs left 250 MiB.
_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_MAPPED_MIN: Final = 1 << 20
_TRIMMED_MIN: Final = 8 << 20

_hanging: Final[list[str]] = []


def note_what_hangs(*names: str) -> None:
    """Let `must_leave_at_once` be true from now on."""
    _hanging.extend(names)


def forget_what_hangs() -> None:
    """Undo `note_what_hangs`: a test has ended a server, and its process continues."""
    _hanging.clear()


def must_leave_at_once() -> bool:
    """Whether the process has to be left by `os._exit`: something hangs."""
    return bool(_hanging)


def give_memory_back() -> None:
    """From now on, large pieces of memory go back to the kernel when they are freed. Other C libraries than glibc do so anyhow."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _MAPPED_MIN)
        mallopt(_M_TRIM_THRESHOLD, _TRIMMED_MIN)


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function to its end on a fast loop."""
    import uvloop  # here: most commands never start a loop

    raise_descriptor_limit()
    give_memory_back()

    async def awaited() -> T:
        return await main()

    # The imported modules stay: to look through them again took a full collection 5 ms, with
    # the loop standing still.
    gc.freeze()
    look_as_usual()
    forget_what_hangs()
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    try:
        return runner.run(awaited())
    except KeyboardInterrupt:
        note_what_hangs("interrupted")  # the second Ctrl-C, at the end
        raise
    finally:
        gc.unfreeze()
        if not must_leave_at_once():
            runner.close()
