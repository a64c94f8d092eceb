# SPDX-License-Identifier: Apache-2.0
"""`in_order`: a command that is ended by a signal leaves nothing behind on the machine."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final, NoReturn

__all__ = ["in_order"]

SIGNALS: Final = (signal.SIGTERM, signal.SIGHUP)
STATUS_BASE: Final = 128  # as a shell reports a signal


@contextmanager
def in_order() -> Iterator[None]:
    """End a block as an exception does, when SIGTERM or SIGHUP comes, as Python itself does for SIGINT.

    The first of them raises SystemExit in the block, so that everything in it is cleared away. The second has its usual effect.
    A signal that is ignored, as under nohup, stays ignored. In a thread that is not the main one, nothing is changed.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}

    def end(number: int, frame: FrameType | None) -> NoReturn:
        for each in SIGNALS:
            signal.signal(each, signal.SIG_DFL)
        raise SystemExit(STATUS_BASE + number)

    for number in SIGNALS:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, end)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
