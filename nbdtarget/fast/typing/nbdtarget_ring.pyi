# SPDX-License-Identifier: Apache-2.0
"""Types of the extension module; what things mean stands in `nbdtarget_ring.pyx`."""

from collections.abc import Callable
from typing import Any, Final

Buffer = Any  # collections.abc.Buffer is new in Python 3.12

ABI: Final[int]

def is_available() -> bool: ...

class Ring:
    event_fd: int
    nr_reads: int
    kept_bytes: int
    left_over: Callable[[], None] | None

    def __init__(self, nr_reads_max: int = 256) -> None: ...
    def read(self, fd: int, buffer: Buffer, offset: int, done: Any) -> bool: ...
    def flush(self) -> bool: ...
    def reap(self) -> list[tuple[Any, int]]: ...
