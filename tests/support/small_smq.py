# SPDX-License-Identifier: Apache-2.0
"""A small smq, and a loop that carries out its migrations as a target would."""

from nbdtarget.policies.base import Work
from nbdtarget.policies.smq.policy import Smq

__all__ = ["BLOCK", "S", "finish_all", "new_smq"]

BLOCK = 1 << 16
S = 1_000_000_000


def new_smq(nr_cblocks: int = 256, kind: type[Smq] = Smq) -> Smq:
    """Make a policy for an origin so large that a hotspot block is 16 cache blocks."""
    return kind(nr_cblocks, origin_size=1 << 40, block_size=BLOCK, now_ns=0)


def finish_all(smq: Smq, *, idle: bool = False, success: bool = True) -> list[Work]:
    """Carry out all migrations at once. Returns them in order."""
    done: list[Work] = []
    while (work := smq.get_background_work(idle)) is not None:
        smq.complete_background_work(work, success)
        done.append(work)
        assert len(done) < 10_000
    return done
