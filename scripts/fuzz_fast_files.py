# SPDX-License-Identifier: Apache-2.0
"""Files of `make fuzz-fast`, some of which misbehave."""

import os
import random
import resource
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
}


class FlakyFile:
    """An open file.

    Attributes:
        fd: its descriptor.
        kind: one of KINDS.
    """

    def __init__(self, path: Path, content: bytes, pick: random.Random) -> None:
        path.write_bytes(content)
        self.kind = pick.choices(list(KINDS), list(KINDS.values()))[0]
        modes = {"read-only": os.O_RDONLY, "write-only": os.O_WRONLY}
        name = Path("/dev/full") if self.kind == "full" else path
        self.fd = os.open(name, modes.get(self.kind, os.O_RDWR))
        self._limit = resource.getrlimit(resource.RLIMIT_FSIZE)
        if self.kind == "short":
            os.ftruncate(self.fd, pick.randrange(len(content)))
        if self.kind == "limited":
            # It holds for the whole process, in which only one round runs. Python ignores the signal.
            limit = pick.randrange(len(content)), self._limit[1]
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    def close(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self._limit)
        os.close(self.fd)
