# SPDX-License-Identifier: Apache-2.0
"""Which epoll instance the event loop waits with: neither asyncio nor uvloop tells, but the kernel does (proc(5))."""

import os
from pathlib import Path

__all__ = ["maybe_epoll_of"]


def maybe_epoll_of(fd: int, process: Path = Path("/proc/self")) -> int | None:
    """Return the descriptor of the epoll instance of this process that watches `fd`; None: there is none, or the kernel does not say."""
    try:
        numbers = sorted(int(entry) for entry in os.listdir(process / "fd"))
    except OSError:
        return None
    for number in numbers:
        try:
            if os.readlink(process / f"fd/{number}") != "anon_inode:[eventpoll]":
                continue
            watched = (process / f"fdinfo/{number}").read_text()
        except OSError:
            continue  # it was closed meanwhile
        for line in watched.splitlines():
            words = line.split()
            if words[:1] == ["tfd:"] and int(words[1]) == fd:
                return number
    return None
