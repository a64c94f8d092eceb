# SPDX-License-Identifier: Apache-2.0
"""How often Python looks for circles of objects that nothing else refers to.

A start makes a hundred thousand objects that all stay: looking through them every 700 new ones took a tenth of its time. A
server must look often again, because a rare look takes longer, and its clients wait meanwhile.
"""

import gc
from typing import Final

__all__ = ["look_as_usual", "look_no_more", "look_rarely"]

_USUAL: Final = gc.get_threshold()
_RARELY: Final = 50_000  # new objects between two looks, each of 2 or 3 ms


def look_rarely() -> None:
    """Let Python look for garbage rarely: while a program starts, and while a command runs that serves no client."""
    gc.set_threshold(_RARELY, *_USUAL[1:])


def look_as_usual() -> None:
    """Let Python look for garbage as often as usual. A server calls this before it serves."""
    gc.set_threshold(*_USUAL)


def look_no_more() -> None:
    """Keep Python from looking through all modules before the process ends. It would do so twice, which took a server 40 ms."""
    gc.freeze()
