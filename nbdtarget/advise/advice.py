# SPDX-License-Identifier: Apache-2.0
"""`advise`: the hit ratios of caches of several sizes for one trace, and the size at which more stops to help.

The sizes are shares of what the trace touches, unless others are given. More stops to help at the smallest size that no larger one beats by more than
one point of the policy's hit ratio (WORTH).
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nbdtarget.advise.caches import belady_hits, lru_hits, policy_run
from nbdtarget.advise.traces import Trace
from nbdtarget.common.errors import NbdTargetError

__all__ = ["Advice", "Ratios", "Request", "advise", "sizes_of"]

SHARES: Final = (1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 3 / 8, 1 / 2, 3 / 4, 1)
WORTH: Final = 0.01
CBLOCKS_MIN: Final = 16  # a policy needs some blocks to work with


@dataclass(frozen=True)
class Request:
    """The options of the advice.

    Args:
        sizes: of caches, bytes; none: shares of what is touched.
        warm_up: accesses that are not counted; None: half of them.
    Attributes: the others are those of `nbdtarget.advise.caches.Options`.
    """

    block_size: int
    policy: str = "smq"
    sizes: tuple[int, ...] = ()
    warm_up: int | None = None


@dataclass
class _Options:
    policy: str
    block_size: int
    warm_up: int
    iops: int
    migrations: float = math.inf
    idle: bool = False
    tick_each: int = 32
    full_promote_level: int | None = None


@dataclass(frozen=True)
class Ratios:
    """Hit ratios of one size, from 0 to 1. `size`: bytes."""

    size: int
    policy: float
    lru: float
    best: float


@dataclass(frozen=True)
class Advice:
    """Attributes:
    policy: its name.
    nr_counted, nr_writes: accesses that were counted, and how many of all were writes.
    touched: bytes of the blocks that the trace touches.
    rows: by size.
    enough: bytes; None: no cache is worth it.
    """

    policy: str
    nr_accesses: int
    nr_counted: int
    nr_writes: int
    touched: int
    rows: tuple[Ratios, ...]
    enough: int | None


def sizes_of(touched: int, block_size: int) -> list[int]:
    """Return the sizes to try, in bytes, each a whole number of blocks."""
    nr_blocks = touched // block_size
    found = {max(CBLOCKS_MIN, round(nr_blocks * share)) for share in SHARES}
    return [nr * block_size for nr in sorted(found)]


def advise(
    trace: Trace,
    request: Request,
    done: Callable[[Ratios], None] = lambda _: None,
) -> Advice:
    """Try each size. Args: done: called with each row as it is there.

    Raises: NbdTargetError: nothing is left to count, or a size is too small.
    """
    block_size, nr = request.block_size, len(trace.blocks)
    warm_up = nr // 2 if request.warm_up is None else request.warm_up
    if warm_up >= nr:
        raise NbdTargetError(
            f"the trace has {nr} accesses: none is left to count after {warm_up} that warm the cache up"
        )
    touched = len(set(trace.blocks)) * block_size
    rows = []
    for size in sorted(request.sizes) or sizes_of(touched, block_size):
        nr_cblocks = size // block_size
        if nr_cblocks < CBLOCKS_MIN:
            raise NbdTargetError(
                f"a cache of {size} bytes has less than {CBLOCKS_MIN} blocks of {block_size} bytes"
            )
        rows.append(_ratios(trace, request, nr_cblocks, warm_up))
        done(rows[-1])
    return Advice(
        policy=request.policy,
        nr_accesses=nr,
        nr_counted=nr - warm_up,
        nr_writes=sum(trace.writes),
        touched=touched,
        rows=tuple(rows),
        enough=enough(rows),
    )


def _ratios(trace: Trace, request: Request, nr_cblocks: int, warm_up: int) -> Ratios:
    counted = len(trace.blocks) - warm_up
    # An access a minute for each block of the cache, as 10,000 a second are for 600,000 blocks.
    iops = max(nr_cblocks // 60, 1)
    options = _Options(request.policy, request.block_size, warm_up, iops)
    return Ratios(
        size=nr_cblocks * request.block_size,
        policy=policy_run(trace, nr_cblocks, options).hits / counted,
        lru=lru_hits(trace, nr_cblocks, warm_up) / counted,
        best=belady_hits(trace, nr_cblocks, warm_up) / counted,
    )


def enough(rows: Sequence[Ratios]) -> int | None:
    """Return the size at which more stops to help; None: no size has hits worth speaking of."""
    most = max(row.policy for row in rows)
    if most < WORTH:
        return None
    return next(row.size for row in rows if row.policy >= most - WORTH)
