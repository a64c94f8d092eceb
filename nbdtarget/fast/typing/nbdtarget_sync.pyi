# SPDX-License-Identifier: Apache-2.0
"""Types of the extension module; what things mean stands in `nbdtarget_sync.pyx`."""

from typing import Final

ABI: Final[int]
RUNS: Final[int]
PIECE_BYTES: Final[int]

def give_way(nice_step: int) -> None: ...

class Syncer:
    event_fd: int
    fake_ns: int

    def __init__(self, fd: int, nice_step: int = 0) -> None: ...
    def begin(self) -> None: ...
    def begin_behind(
        self, ranges: list[tuple[int, int]], before: list[tuple[int, int]]
    ) -> None: ...
    def take(self) -> int: ...
    def close(self) -> None: ...
