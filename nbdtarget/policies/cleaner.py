# SPDX-License-Identifier: Apache-2.0
"""cleaner: smq without promotions and demotions. It writes back all dirty blocks, before a cache is removed.

Cached blocks are still served from the cache. In the mode writeback, writes to them still make them dirty, so
the cleaner may never be done: use it with writethrough. While the cache is busy, only blocks that were
not used for a while are written back; while it is idle, all are. The work is done when no block is dirty.
"""

from typing import ClassVar

from nbdtarget.policies.smq.policy import Smq

__all__ = ["Cleaner"]


class Cleaner(Smq):
    """See the module head."""

    name: ClassVar[str] = "cleaner"
    is_cleaner: ClassVar[bool] = True
