# SPDX-License-Identifier: Apache-2.0
"""Files of `make fuzz-fast`, some of which misbehave."""

import os
import random
import resource
import threading
from pathlib import Path
from typing import Final

__all__ = ["FlakyFile"]

KINDS: Final = {
    "whole": 14,
    "short": 2,  # it ends before it should
    "read-only": 1,  # a write fails
    "write-only": 1,  # a read fails
    "limited": 1,  # from some place on, writes fail; one across it is done in part
    "full": 1,  # no write finds room
    "changing": 3,  # another thread truncates it, and has it grow again, all the time
}
CHANGE_S: Final = 0.0005  # between two changes


class FlakyFile:
    """An open file.

    Attributes:
        fd: its descriptor.
        kind: one of KINDS.
    """

    def __init__(
        self,
        path: Path,
        content: bytes,
        pick: random.Random,
        *,
        may_change: bool = False,
    ) -> None:
        """Args: may_change: whether it may be of the kind "changing", where nothing that is read says anything."""
        path.write_bytes(content)
        kinds = dict(KINDS)
        if not may_change:
            del kinds["changing"]
        self.kind = pick.choices(list(kinds), list(kinds.values()))[0]
        modes = {"read-only": os.O_RDONLY, "write-only": os.O_WRONLY}
        name = Path("/dev/full") if self.kind == "full" else path
        self.fd = os.open(name, modes.get(self.kind, os.O_RDWR))
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.kind == "short":
            os.ftruncate(self.fd, pick.randrange(len(content)))
        self._is_over = threading.Event()
        self._changes = threading.Thread(
            target=self._change, args=(content, random.Random(pick.random()))
        )
        if self.kind == "changing":
            self._changes.start()
        if self.kind == "limited":
            # It holds for the whole process, in which only one round runs. Python ignores the signal.
            limit = pick.randrange(len(content)), self._limit[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def _change(self, content: bytes, pick: random.Random) -> None:
        while not self._is_over.wait(CHANGE_S):
            at = pick.choice((0, pick.randrange(len(content))))
            os.ftruncate(self.fd, at)
            if self._is_over.wait(pick.choice((0, CHANGE_S))):
                return
            os.pwrite(self.fd, content[at:], at)

    def close(self) -> None:
        self._is_over.set()
        if self._changes.ident is not None:
            self._changes.join()
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        os.close(self.fd)
