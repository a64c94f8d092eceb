# SPDX-License-Identifier: Apache-2.0
"""A large WRITE whose payload is being received: it has memory of its own, which is counted as the payload comes.

The header of the request alone takes `Limits.payload_step` of the budget, and no memory. Each further step is counted
when the step before is full. All these further steps of all connections together may take half of the budget, so that
payloads that clients send by half and then leave never keep other clients from reading, or from writing what is not
longer than a step. Above that, a connection waits with half its payload received. So that they do not all wait for
each other, one WRITE at a time is *favoured*: it may go beyond the budget until its payload is complete.
"""

from nbdtarget.bio import Bio
from nbdtarget.server.buffers import Buffer
from nbdtarget.server.flow import Flow

__all__ = ["LargeWrite"]


class LargeWrite:
    """See the module head.

    Attributes:
        bio: what to submit when the payload is complete.
        buffer: where `payload` lies.
        charge: bytes of the budget that it holds, and that may be received.
        filled: bytes of the payload that were received.
        grown: bytes that it was charged since it began.
        progress_at: when so many bytes were received, the client counts as having moved.
    """

    __slots__ = (
        "_flow",
        "_step",
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
        self, bio: Bio, buffer: Buffer, charge: int, filled: int, flow: Flow, step: int
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
        self._flow = flow
        self._step = step

    def grow(self) -> bool:
        """Count the bytes that the next receives may bring. Return False if it has to wait for the budget."""
        more = min(self.length - self.charge, self._step)
        if not self._flow.grow(self, more):
            return False
        self.grown += more
        self.charge += more
        return True

    def leave(self) -> None:
        """The payload is complete, or never will be."""
        self._flow.end_growth(self, self.grown)
