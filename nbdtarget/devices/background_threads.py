# SPDX-License-Identifier: Apache-2.0
"""How threads that no client waits for come after those who serve clients.

Theory of operation. Such a thread is a batch job (SCHED_BATCH), nicer than the others by NICE_STEP, and has the longest time slice that there
is. Where processors are scarce, those who serve clients come first; without anything else to do for the processors, background work is as fast as
ever. The slice matters most: Linux 6.12 and later lets a thread that wakes up with a shorter slice have the processor
at once. An older kernel, and a Python without the compiled half, leave it at the other two: then a client may wait until a tick of the
scheduler ends the slice, some milliseconds.

It is not SCHED_IDLE: where other programs compute on all processors, that would leave a hydration next to nothing, and a client that
waits for a lock of the file would wait for it.

None of this needs a privilege. Where it is forbidden (by a filter of system calls), background work competes with clients as before.
"""

import os
from contextlib import suppress
from typing import Final

from nbdtarget.fast import compiled

__all__ = ["NICE_STEP", "begin_to_give_way"]

NICE_STEP: Final = 5


def begin_to_give_way() -> None:
    """The calling thread comes after those who serve clients, for the rest of its life."""
    if compiled.IS_COMPILED:
        compiled.give_way(NICE_STEP)
        return
    os.nice(NICE_STEP)  # of the thread, on Linux
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
