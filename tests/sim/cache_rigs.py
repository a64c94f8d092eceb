# SPDX-License-Identifier: Apache-2.0
"""Simulated machines with a cache: in each mode, over a clone, and from one mode to another.

The cache is about half as large as the origin, and its blocks have a few sectors only
(`small_blocks`), so promotions, demotions and reuse come often; blocks of 3 KiB are no power of two.

Reloads bring other modes, policies and features, passthrough among them, which may be refused: then
the operator loads the rig's own table again. After a life in which a disk went bad an
administrator clears `needs_check`, having checked.
"""

import errno as errnos
import random
from collections.abc import Sequence
from typing import Final

from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK, WRITETHROUGH
from nbdtarget_metadata.cache.metadata import CacheMetadata
from tests.sim.rigs import (
    SECTORS,
    Disk,
    Message,
    Rig,
    Role,
    clone_disks,
    clone_line,
    clone_messages,
)
from tests.support.crash.rigs import CONTENT
from tests.support.model import SECTOR

__all__ = [
    "cache",
    "cache_over_clone",
    "cache_passthrough",
    "cache_switching",
    "cache_writethrough",
]

BLOCK_SIZES: Final = (6 * SECTOR, 8 * SECTOR, 8 * SECTOR)
REFUSALS: Final = (errnos.EPERM, errnos.EBUSY)


def _line(
    rng: random.Random,
    mode: str,
    block_size: int,
    *,
    origin: str = "/origin",
    policies: Sequence[str] = ("smq", "smq", "default"),
    features: Sequence[str] = (
        "dirty_log",
        "sorted_writeback",
        "no_discard_passdown",
        "metadata2",
    ),
) -> str:
    words = [mode, *(word for word in features if rng.random() < 0.3)]
    arguments = ""
    if rng.random() < 0.3:
        arguments = f"migration_threshold {rng.choice((0, 8, 64))}"
    return (
        f"0 {SECTORS} cache /metadata /cache {origin} {block_size // SECTOR}"
        f" {len(words)} {' '.join(words)} {rng.choice(policies)}"
        f" {len(arguments.split())} {arguments}".rstrip()
    )


def _disks(block_size: int, nr_cblocks: int) -> tuple[Disk, Disk]:
    size = CacheMetadata.device_size_min(nr_cblocks)
    return (
        Disk("/metadata", size, Role.METADATA, bytes(size), is_cache=True),
        Disk("/cache", nr_cblocks * block_size),
    )


def _messages(nr_oblocks: int, nr_cblocks: int) -> tuple[Message, ...]:
    middle = nr_oblocks // 2
    return tuple(
        ("d", 0, tuple(words.split()))
        for words in (
            f"warm 0-{middle}",
            f"warm {middle}-{nr_oblocks}",
            f"warm 0-{nr_oblocks}",
            "warm 1",
            f"pin {middle}",
            f"unpin 0-{nr_oblocks}",
            "clean_now",
            "clean_now",
            "migration_threshold 0",
            "migration_threshold 2048",
            "migration_rate 10000",
            "migration_rate 0",
            f"invalidate_cblocks 0-{nr_cblocks}",
            "invalidate_cblocks 1 2-4",
        )
    )


def _rig(
    name: str,
    rng: random.Random,
    modes: Sequence[str],
    *,
    others: Sequence[str] = (),
    policies: Sequence[str] = ("smq", "smq", "default"),
) -> Rig:
    """A cache over one disk; reloads bring `others`, or the same with other features."""
    block_size = rng.choice(BLOCK_SIZES)
    nr_cblocks = rng.choice((4, 5))
    nr_oblocks = len(CONTENT) // block_size
    return Rig(
        name,
        _line(rng, rng.choice(modes), block_size),
        CONTENT,
        (
            *_disks(block_size, nr_cblocks),
            Disk("/origin", len(CONTENT), content=CONTENT),
        ),
        _messages(nr_oblocks, nr_cblocks),
        region_size=block_size,
        others=tuple(
            _line(rng, mode, block_size, policies=policies) for mode in others or modes
        ),
        refusals=REFUSALS,
        discards_last=True,
    )


def cache(rng: random.Random) -> Rig:
    """Writeback; features come and go."""
    return _rig("cache", rng, (WRITEBACK,), others=(WRITEBACK, WRITEBACK))


def cache_writethrough(rng: random.Random) -> Rig:
    """Writethrough; features come and go."""
    return _rig("cache_writethrough", rng, (WRITETHROUGH,))


def cache_passthrough(rng: random.Random) -> Rig:
    """Passthrough, which invalidates the blocks that another mode has cached, one by one."""
    return _rig(
        "cache_passthrough",
        rng,
        (WRITEBACK, WRITEBACK, WRITETHROUGH),
        others=(PASSTHROUGH, PASSTHROUGH, WRITEBACK),
    )


def cache_switching(rng: random.Random) -> Rig:
    """Any mode, any policy, with I/O in flight."""
    return _rig(
        "cache_switching",
        rng,
        (WRITEBACK, WRITETHROUGH),
        others=(WRITEBACK, WRITEBACK, WRITETHROUGH, PASSTHROUGH, WRITETHROUGH),
        policies=("smq", "mq", "cleaner", "default"),
    )


def cache_over_clone(rng: random.Random) -> Rig:
    """The origin is a clone, which hydrates meanwhile."""
    block_size = rng.choice(BLOCK_SIZES)
    nr_cblocks = rng.choice((4, 5))
    origin = "/dev/mapper/clone"
    modes = (WRITEBACK, WRITEBACK, WRITETHROUGH)
    return Rig(
        "cache_over_clone",
        _line(rng, rng.choice(modes), block_size, origin=origin),
        CONTENT,
        (*_disks(block_size, nr_cblocks), *clone_disks("1", CONTENT)),
        (
            *_messages(len(CONTENT) // block_size, nr_cblocks),
            *clone_messages("clone"),
        ),
        region_size=block_size,
        below=(("clone", f"0 {SECTORS} {clone_line(rng, '1')}"),),
        others=tuple(_line(rng, mode, block_size, origin=origin) for mode in modes),
        refusals=REFUSALS,
        discards_last=True,
    )
