# SPDX-License-Identifier: Apache-2.0
"""`trim_heap`: pages of the C library's heap that hold nothing go back to the system.

glibc gives back the end of its heap by itself. What is free in the middle stays resident, because a small piece that is still used lies
behind it: 1,000 clients that had replies of 64 KiB waiting left 30 MiB.
"""

import ctypes
import threading
from typing import Final

__all__ = ["trim_heap"]

_malloc_trim: Final = getattr(ctypes.CDLL(None), "malloc_trim", None)


def trim_heap() -> None:
    """Begin to give them back, in a thread: 20 ms for 40 MiB. Other C libraries than glibc do without."""
    if _malloc_trim is not None:
        name = "nbdtarget-trim"
        threading.Thread(target=_malloc_trim, args=(0,), name=name, daemon=True).start()
