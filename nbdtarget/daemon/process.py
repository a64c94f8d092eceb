# SPDX-License-Identifier: Apache-2.0
"""The process of a server: its event loop, and whether it must be left without waiting.

Python waits for tasks and for threads before it ends. What hangs in a system call would never let it
end, so `Daemon` notes here what hangs, and `nbdtarget.cli.app` then leaves the process by `os._exit`.
"""

import asyncio
import gc
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from nbdtarget.server.admission import raise_descriptor_limit

__all__ = ["forget_what_hangs", "must_leave_at_once", "note_what_hangs", "run"]

T = TypeVar("T")

_hanging: Final[list[str]] = []


def note_what_hangs(*names: str) -> None:
    """From now on `must_leave_at_once`."""
    _hanging.extend(names)


def forget_what_hangs() -> None:
    """A test has ended a server, and its process goes on."""
    _hanging.clear()


def must_leave_at_once() -> bool:
    """Whether the process has to be left by `os._exit`: something hangs."""
    return bool(_hanging)


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function to its end on a fast loop."""
    import uvloop  # here: most commands never start a loop

    raise_descriptor_limit()

    async def awaited() -> T:
        return await main()

    # What has been imported stays: to look through it again took a full collection 5 ms, with
    # the loop standing still.
    gc.freeze()
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
