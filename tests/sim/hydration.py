# SPDX-License-Identifier: Apache-2.0
"""The model of a clone's hydration: what later answers may say, given the earlier ones.

Theory of operation. Clients ask for `x-nbdtarget:hydration` with their BLOCK_STATUS. A sector that
was told to be hydrated stays so for as long as the machine lives: a client that asks after the answer
has come must be told the same. If a FLUSH was sent after that answer, and has succeeded, the sector stays hydrated for ever.

A failed commit takes bits back (`forget`), and what was promised by a FLUSH remains.
"""

from collections.abc import Iterable
from typing import Final

from nbdtarget.targets.clone.extents import HYDRATION_ACTIVE, HYDRATION_SOURCE
from tests.sim.model import SECTOR, Violation

__all__ = ["CONTEXT", "HydrationModel"]

CONTEXT: Final = "x-nbdtarget:hydration"
STATES: Final = (0, HYDRATION_SOURCE, HYDRATION_SOURCE | HYDRATION_ACTIVE)

Told = frozenset[int]  # sectors


class HydrationModel:
    """See the module head."""

    def __init__(self) -> None:
        self._durable: Told = frozenset()
        self._told: Told = frozenset()
        self._is_reliable = True

    def power_on(self) -> None:
        """A new life begins."""
        self._told = self._durable
        self._is_reliable = True

    def start(self) -> Told:
        """Return the sectors that a BLOCK_STATUS or a FLUSH sent now must find hydrated."""
        return self._told

    def end_flush(self, told: Told) -> None:
        """Note that a FLUSH has succeeded. `told` is the result of `start`."""
        self._durable |= told

    def forget(self) -> None:
        """Keep only the bits that a FLUSH has promised: the others were lost, or taken back."""
        self._told = self._durable
        self._is_reliable = False

    def trust_again(self) -> None:
        """Trust all answers again: the clone that lost its bits was started anew."""
        self._told = self._durable
        self._is_reliable = True

    def check(
        self, told: Told, offset: int, extents: Iterable[tuple[int, int]]
    ) -> None:
        """Hold an answer against what was told before. Raises: Violation."""
        # Bits that no FLUSH has promised may have been lost since.
        certain = told & (self._told if self._is_reliable else self._durable)
        found: set[int] = set()
        for length, state in extents:
            if state not in STATES:
                raise Violation(f"hydration {state} at {offset}")
            sectors = range(offset // SECTOR, -(-(offset + length) // SECTOR))
            if state == 0:
                found.update(sectors)
            elif lost := certain.intersection(sectors):
                raise Violation(f"not hydrated any more: sectors {sorted(lost)}")
            offset += length
        if self._is_reliable:
            self._told |= found
