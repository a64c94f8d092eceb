# SPDX-License-Identifier: Apache-2.0
"""cleaner: smq that may not migrate; it writes all that is dirty back, to end a cache.

What is cached is served from the cache as ever, and writes go on to make blocks dirty where the
mode lets them: for an end to the writing back, use it with writethrough. While there is other I/O
it takes only blocks that were not used for a while; when idle, all. It is done when no block
is dirty.
"""

from typing import ClassVar

from nbdtarget.policies.smq.policy import Smq

__all__ = ["Cleaner"]


class Cleaner(Smq):
    name: ClassVar[str] = "cleaner"
    is_cleaner: ClassVar[bool] = True
