# SPDX-License-Identifier: Apache-2.0
"""Types of the extension module; what things mean stands in `nbdtarget_map.pyx`."""

from collections.abc import Callable
from typing import Final

ABI: Final[int]
LENGTH_MIN: Final[int]
WINDOW_BYTES: Final[int]

class Windows:
    nr_mapped: int
    nr_made: int
    nr_sent: int

    def __init__(
        self,
        bytes_max: int,
        sweep_wanted: Callable[[], None],
        window_bytes: int = ...,
        length_min: int = ...,
    ) -> None: ...
    def takes(self, fd: int, size: int) -> bool: ...
    def sweep(self, nr_max: int) -> bool: ...
    def drop(self, owner: int, nr_max: int) -> bool: ...
