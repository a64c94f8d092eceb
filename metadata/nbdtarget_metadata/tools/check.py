# SPDX-License-Identifier: Apache-2.0
"""Check any metadata, offline, without knowing what device it belongs to.

The server stops at the first thing that is wrong. `examine` goes on, and tells apart

    damage     what the newest superblock vouches for is not intact: the server refuses it
    unhealed   superblock copies that differ, or that are rotten while their sibling is not: the
               server does without, and its next commits rewrite them
    orphans    intact records that no superblock vouches for: what a compaction left in the other arena,
               what a crash left of a commit. Never read, and overwritten in time
    leaks      blocks with other content that no superblock vouches for: parts of former records

Only damage matters. Metadata in use has orphans and leaks most of the time.

`mend` does what little can be done in place without losing anything: it rewrites unhealed
copies from their siblings, and takes back `needs_check`, as a commit without changes.

Both work for any kind: its `KindChecks` (clone_check.py, cache_check.py) say what is particular to it.
"""

from collections.abc import Callable
from typing import Any, Final, Generic, NamedTuple

import msgspec

from nbdtarget_metadata.errors import CorruptMetadata, MetadataTooSmall
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.scan import Placed, scan
from nbdtarget_metadata.log.superblock import (
    NEEDS_CHECK,
    NR_SLOTS,
    SUPERBLOCK_BLOCKS,
    Copy,
    S,
    Superblock,
    SuperblockType,
    choose_superblock,
    open_copies,
    read_area,
    superblock_block,
    write_superblock,
)
from nbdtarget_metadata.operations import Flush, Steps

__all__ = [
    "GAPS_MAX",
    "CopyState",
    "Findings",
    "KindChecks",
    "examine",
    "mend",
]

# How many broken places are named. A rotten disk has thousands, and the first ones are enough.
GAPS_MAX: Final = 16


class CopyState(msgspec.Struct, frozen=True, kw_only=True):
    """One superblock copy.

    `state`: "newest"; "older", of the commit before it; "stale", while its sibling is newer;
    "invalid", and `fault` says why.
    """

    slot: int
    copy: int
    block: int
    generation: int | None
    state: str
    fault: str


class Findings(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `examine`; the module head defines the words.

    Attributes:
        superblock: the newest; None if damage leaves none to believe.
        damage: one line each; none: the server would open it (but for `needs_check`).
        unhealed: slots.
        orphans: records; `orphan_blocks` what they occupy.
        complete: everything was looked at.
    """

    copies: tuple[CopyState, ...]
    superblock: Superblock | None = None
    damage: tuple[str, ...] = ()
    unhealed: tuple[int, ...] = ()
    needs_check: bool = False
    orphans: int = 0
    orphan_blocks: int = 0
    leaked_blocks: int = 0
    complete: bool = False


class KindChecks(NamedTuple, Generic[S]):
    """The things that `examine` must know of a kind of metadata.

    Attributes:
        check_size: raises MetadataTooSmall if the device has shrunk.
        load: reads and checks everything, and raises what the server would.
        live: the block ranges that the superblock vouches for, ascending; `end` of all that is laid out.
        decode: any record, wherever it stands.
        faults: the rest of what is wrong where every record is intact; `load` stops at the first.
    """

    kind: SuperblockType[S]
    check_size: Callable[[S, int], None]
    load: Callable[[S, int], Steps[object]]
    live: Callable[[S], list[tuple[int, int]]]
    end: Callable[[S], int]
    decode: Callable[[memoryview, str], Any]
    faults: Callable[[S], Steps[list[str]]]


def examine(
    checks: KindChecks[S],
    device_size: int,
    *,
    records: bool = True,
    unused: bool = True,
) -> Steps[Findings]:
    """Look at everything and return what is there. Writes nothing.

    Args:
        records: read what the superblock vouches for; else only the superblocks.
        unused: look for orphans and leaks.

    Raises: NotFormatted, NotOurs, UnsupportedFormat; MetadataTooSmall: for any metadata.
    """
    area = yield from read_area(device_size)
    try:
        found = choose_superblock(checks.kind, area, admit_needs_check=True)
    except CorruptMetadata as error:
        return Findings(copies=_maybe_states(checks.kind, area), damage=(str(error),))
    superblock = found.superblock
    damage: list[str] = []
    try:
        checks.check_size(superblock, device_size)
        if records:
            yield from checks.load(superblock, device_size)
    except (CorruptMetadata, MetadataTooSmall) as error:
        damage.append(str(error))
    if damage and records:
        gaps = yield from _gaps(checks, superblock, device_size)
        faults = gaps or (yield from checks.faults(superblock))
        damage += [line for line in faults if line not in damage]
    orphans = _Unvouched()
    if unused:
        for begin, end in _unvouched_ranges(checks, superblock, device_size):
            yield from scan(
                begin,
                end,
                decode=checks.decode,
                intact=orphans.count_orphan,
                other=orphans.count_other,
            )
    return Findings(
        copies=_states(open_copies(checks.kind, area), superblock.generation),
        superblock=superblock,
        damage=tuple(damage),
        unhealed=tuple(sorted(found.unhealed)),
        needs_check=bool(superblock.flags & NEEDS_CHECK),
        orphans=orphans.records,
        orphan_blocks=orphans.record_blocks,
        leaked_blocks=orphans.leaked_blocks,
        complete=records and unused,
    )


def mend(
    checks: KindChecks[S], device_size: int, *, heal: bool, clear_needs_check: bool
) -> Steps[tuple[str, ...]]:
    """Check everything; if there is no damage, rewrite what the arguments name.

    Returns what was done, a sentence each; nothing is written if there is nothing to do.

    Raises: what `examine` does; CorruptMetadata: there is damage. Then nothing was written.
    Durable: what was done. A crash leaves each copy as it was or as it will be.
    """
    findings = yield from examine(checks, device_size)
    if findings.damage or findings.superblock is None:
        raise CorruptMetadata("the metadata", "no damage", "; ".join(findings.damage))
    done = []
    for slot in findings.unhealed if heal else ():
        area = yield from read_area(device_size)
        copies = open_copies(checks.kind, area)[slot]
        valid = [copy.superblock for copy in copies if copy.superblock]
        yield from write_superblock(max(valid, key=lambda each: each.generation))
        done.append(f"superblock slot {slot} has two good copies again")
    if clear_needs_check and findings.needs_check:
        superblock = findings.superblock
        yield from write_superblock(
            msgspec.structs.replace(
                superblock,
                generation=superblock.generation + 1,
                nr_commits=superblock.nr_commits + 1,
                flags=superblock.flags & ~NEEDS_CHECK,
            )
        )
        done.append("needs_check is cleared")
    if done:
        yield Flush()
    return tuple(done)


# Inside


class _Unvouched:
    """Counts what lies outside the live ranges."""

    def __init__(self) -> None:
        self.records = 0
        self.record_blocks = 0
        self.leaked_blocks = 0

    def count_orphan(self, placed: Placed[Any]) -> None:
        self.records += 1
        self.record_blocks += placed.end - placed.block

    def count_other(self, block: int, is_zero: bool) -> None:
        self.leaked_blocks += not is_zero


def _unvouched_ranges(
    checks: KindChecks[S], superblock: S, device_size: int
) -> list[tuple[int, int]]:
    """Return the laid-out ranges without the live ones, within the device."""
    end = min(checks.end(superblock), device_size // BLOCK_SIZE)
    ranges = []
    begin = SUPERBLOCK_BLOCKS
    for first, last in [*checks.live(superblock), (end, end)]:
        if begin < min(first, end):
            ranges.append((begin, min(first, end)))
        begin = max(begin, last)
    return ranges


def _gaps(checks: KindChecks[S], superblock: S, device_size: int) -> Steps[list[str]]:
    """Name the blocks of the live ranges that hold no intact record."""
    gaps: list[list[int]] = []

    def note(block: int, is_zero: bool) -> None:
        if gaps and gaps[-1][1] == block:
            gaps[-1][1] += 1
        else:
            gaps.append([block, block + 1])

    def intact(placed: Placed[Any]) -> None:
        """Do nothing: an intact record is not reported."""

    for begin, last in checks.live(superblock):
        end = min(last, device_size // BLOCK_SIZE)
        yield from scan(begin, end, decode=checks.decode, intact=intact, other=note)
        if end < last:
            gaps.append([max(end, begin), last])
    lines = [
        f"no intact record in blocks {first} to {last - 1}" for first, last in gaps
    ]
    if len(lines) > GAPS_MAX:
        lines[GAPS_MAX:] = [f"and in {len(lines) - GAPS_MAX} more places"]
    return lines


def _maybe_states(kind: SuperblockType[S], area: memoryview) -> tuple[CopyState, ...]:
    """The copies one by one, where they are too damaged to choose one."""
    try:
        copies = open_copies(kind, area)
    except CorruptMetadata:
        return ()  # an intact envelope around nonsense: `damage` names it
    valid = [copy.superblock for slot in copies for copy in slot if copy.superblock]
    newest = max((each.generation for each in valid), default=-1)
    return _states(copies, newest)


def _states(copies: list[list[Copy[S]]], newest: int) -> tuple[CopyState, ...]:
    states = []
    for slot, pair in enumerate(copies):
        for nr, copy in enumerate(pair):
            generation = copy.superblock.generation if copy.superblock else None
            states.append(
                CopyState(
                    slot=slot,
                    copy=nr,
                    block=superblock_block(slot, nr),
                    generation=generation,
                    state=_state(generation, newest),
                    fault=copy.fault,
                )
            )
    return tuple(states)


def _state(generation: int | None, newest: int) -> str:
    if generation is None:
        return "invalid"
    if generation == newest:
        return "newest"
    return "stale" if (newest - generation) % NR_SLOTS == 0 else "older"
