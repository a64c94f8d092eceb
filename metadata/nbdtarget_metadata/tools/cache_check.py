# SPDX-License-Identifier: Apache-2.0
"""The things that `examine` and `mend` (check.py) must know of a cache's metadata.

`mend` leaves CLEAN_SHUTDOWN as it is.

Where every record is intact and yet the whole cannot be (no crash and no rot leaves that, only a
bug), all of it is reported, not just the first: values with unknown flags, mappings behind the end
of the cache or of the origin, two cache blocks of one origin block, dirty bits of blocks that
are not mapped or, with `dirty_log`, not logged, and counts that do not agree.
"""

from array import array
from typing import Final

from bitarray import bitarray

from nbdtarget_metadata.cache.load import Sync, load
from nbdtarget_metadata.cache.records import (
    LOGGED,
    VALID,
    ArenaRecord,
    Words,
    decode_arena_record,
)
from nbdtarget_metadata.cache.superblock import (
    CACHE,
    DIRTY_LOG,
    CacheSuperblock,
    check_device_size,
)
from nbdtarget_metadata.errors import CorruptMetadata
from nbdtarget_metadata.log.scan import Placed, pass_over, scan
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.cache_values import (
    decode_any_record,
    faults_of,
    flagged,
    statements,
)
from nbdtarget_metadata.tools.check import (
    GAPS_MAX,
    KindChecks,
)

__all__ = ["CACHE_CHECKS"]


def _live(superblock: CacheSuperblock) -> list[tuple[int, int]]:
    sync = superblock.sync_begin
    ranges = [
        (superblock.snapshot_block, superblock.journal_end),
        (sync, sync + superblock.sync_blocks),
    ]
    return [each for each in ranges if each[0] < each[1]]


def _end(superblock: CacheSuperblock) -> int:
    return superblock.device_blocks


def _faults(superblock: CacheSuperblock) -> Steps[list[str]]:
    """Return all that is wrong though every record is intact; called if anything is."""
    values = yield from _read_values(superblock)
    nr_cblocks = superblock.nr_cblocks
    lines = [
        str(CorruptMetadata("mapping of a cache block", f"below {nr_cblocks}", cblock))
        for cblock in range(nr_cblocks, len(values))
        if values[cblock]
    ]
    del values[nr_cblocks:]
    lines += [str(fault.error) for fault in (yield from faults_of(superblock, values))]
    mapped, logged = flagged(values, VALID), flagged(values, LOGGED)
    lines += _miscounted("mapped", superblock.nr_mapped, mapped.count())
    lines += _miscounted("logged", superblock.nr_logged, logged.count())
    if superblock.flags & CLEAN_SHUTDOWN:
        lines += yield from _sync_faults(superblock, mapped, logged)
    if len(lines) > GAPS_MAX:
        lines[GAPS_MAX:] = [f"and {len(lines) - GAPS_MAX} more faults"]
    return lines


def _read_values(superblock: CacheSuperblock) -> Steps[Words]:
    values: Words = array("Q", bytes(8 * superblock.nr_cblocks))

    def intact(placed: Placed[ArenaRecord]) -> None:
        for cblock, value in statements(placed.record):
            if cblock >= superblock.nr_cblocks_max:
                continue  # `load` has reported it
            if cblock >= len(values):
                values.frombytes(bytes(8 * (cblock + 1 - len(values))))
            values[cblock] = value

    yield from scan(
        superblock.snapshot_block,
        superblock.journal_end,
        decode=decode_arena_record,
        intact=intact,
        other=pass_over,
    )
    return values


def _sync_faults(
    superblock: CacheSuperblock, mapped: bitarray, logged: bitarray
) -> Steps[list[str]]:
    sync = Sync(superblock)
    try:
        yield from sync.read()
        sync.discarded()
    except CorruptMetadata as error:
        return [str(error)]
    lines = _misplaced(sync.dirty & ~mapped, "unmapped")
    if superblock.incompat & DIRTY_LOG:
        lines += _misplaced(sync.dirty & ~logged & mapped, "not logged")
    return lines + _miscounted("dirty", superblock.nr_dirty, sync.dirty.count())


def _misplaced(bits: bitarray, state: str) -> list[str]:
    return [
        str(
            CorruptMetadata(
                f"dirty bit of cache block {cblock}, which is {state}", 0, 1
            )
        )
        for cblock in bits.search(1)
    ]


def _miscounted(what: str, expected: int, found: int) -> list[str]:
    if expected == found:
        return []
    return [str(CorruptMetadata(f"number of {what} cache blocks", expected, found))]


CACHE_CHECKS: Final = KindChecks(
    kind=CACHE,
    check_size=check_device_size,
    load=load,
    live=_live,
    end=_end,
    decode=decode_any_record,
    faults=_faults,
)
