# SPDX-License-Identifier: Apache-2.0
"""`ACTIVITY`: whether clients are being served, for work that has to give way to them.

Theory of operation. The code that receives from clients counts the batches, and does nothing else for each. Background work looks at the number
now and then: if it has grown, clients are active. The compiled path counts for itself (`nbdtarget_fast.batches_received`).

One number for the process: what processors have to be shared for is not a matter of one device.
"""

from typing import Final

from nbdtarget.fast.compiled import batches_received

__all__ = ["ACTIVITY", "Activity", "all_batches"]


class Activity:
    """See the module head. Context: the event loop. Attributes: nr_batches: received from clients by code in Python; it only grows."""

    __slots__ = ("nr_batches",)

    def __init__(self) -> None:
        self.nr_batches = 0


ACTIVITY: Final = Activity()


def all_batches() -> int:
    """Return how many batches this process has received from clients on both paths; the number only grows."""
    return ACTIVITY.nr_batches + batches_received()
