# SPDX-License-Identifier: Apache-2.0
"""A large WRITE whose payload is on its way: memory of its own, taken and counted as the payload comes.

The header alone takes `Limits.payload_step` of the budget, and no memory. Each further step is counted when the one
before is full. All such further steps together may take half of the budget, so that what clients send half and
then leave never keeps others from reading, or from writing what is not longer than a step. Above that a connection
waits, half its payload received; so that they do not all wait for each other, one at a time is *favoured*: it
may go beyond the budget, until its payload is there.
"""

from nbdtarget.bio import Bio
from nbdtarget.server.buffers import Buffer
from nbdtarget.server.limits import Budget

__all__ = ["LargeWrite"]


class LargeWrite:
    """See the module head.

    Attributes:
        bio: what to submit when the payload is there.
        buffer: where `payload` lies.
        charge: bytes of the budget that it holds, and that may be received.
        filled: bytes of the payload that are there.
        grown: what it was charged since it began.
        progress_at: at how many the client is said to have moved.
    """

    __slots__ = (
        "_budget",
        "bio",
        "buffer",
        "charge",
        "filled",
        "grown",
        "length",
        "payload",
        "progress_at",
    )

    def __init__(
        self, bio: Bio, buffer: Buffer, charge: int, filled: int, budget: Budget
    ) -> None:
        assert bio.payload is not None
        self.bio = bio
        self.buffer = buffer
        self.payload = bio.payload
        self.length = bio.length
        self.filled = filled
        self.charge = charge
        self.progress_at = filled
        self.grown = 0
        self._budget = budget

    def grow(self) -> int:
        """Count what the next receives may bring. Returns how many bytes; -1: it has to wait for the budget."""
        more = min(self.length - self.charge, self._budget.payload_step)
        budget = self._budget
        if (
            budget.nr_bytes + more > budget.bytes_max
            or budget.nr_growing + more > budget.bytes_max // 2
        ):
            if budget.favoured is None:
                budget.favoured = self
            elif budget.favoured is not self:
                return -1
        budget.nr_bytes += more
        budget.nr_growing += more
        self.grown += more
        self.charge += more
        return more

    def leave(self) -> None:
        """It is complete, or never will be."""
        self._budget.nr_growing -= self.grown
        if self._budget.favoured is self:
            self._budget.favoured = None
