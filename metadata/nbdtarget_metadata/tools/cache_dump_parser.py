# SPDX-License-Identifier: Apache-2.0
"""Read a cache's dump back: `Fields` (dump_fields.py), and what follows from what.

No two cache blocks may hold one origin block, none lies behind an end, and what counts as
dirty must be what the flags make it.
"""

from array import array
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, Final

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.records import (
    LOGGED,
    NR_CBLOCKS_MAX,
    NR_OBLOCKS_MAX,
    OBLOCK_SHIFT,
    VALID,
    Words,
)
from nbdtarget_metadata.cache.superblock import (
    DIRTY_LOG,
    NO_POLICY,
    NR_DBLOCKS_MAX,
    ORIGIN_COMPLETE,
    POLICY_NAME_MAX,
    PolicyIdentity,
)
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, COUNTER_MAX
from nbdtarget_metadata.tools.cache_dump import state_words
from nbdtarget_metadata.tools.dump import disks_from_text
from nbdtarget_metadata.tools.dump_fields import (
    BITS_MAX,
    BadRow,
    Fields,
    Rows,
    RunReader,
    number,
)
from nbdtarget_metadata.units import block_size_fault

__all__ = ["MappingReader", "parse_cache"]

HINT_MAX: Final = (1 << 32) - 1

# The fields that are numbers, and their ranges.
_NUMBERS: Final = {
    "generation": (1, COUNTER_MAX),
    "compat": (0, BITS_MAX),
    "ro_compat": (0, BITS_MAX),
    "nr_commits": (0, COUNTER_MAX),
    "nr_compactions": (0, COUNTER_MAX),
    "block_size_bytes": (1, BITS_MAX),
    "origin_size_bytes": (1, BITS_MAX),
    "nr_cblocks": (1, NR_CBLOCKS_MAX),
    "nr_mapped": (0, NR_CBLOCKS_MAX),
    "nr_dirty": (0, NR_CBLOCKS_MAX),
    "read_hits": (0, COUNTER_MAX),
    "read_misses": (0, COUNTER_MAX),
    "write_hits": (0, COUNTER_MAX),
    "write_misses": (0, COUNTER_MAX),
    "discard_block_size_bytes": (1, COUNTER_MAX),
    "nr_discard_blocks": (1, NR_DBLOCKS_MAX),
}
_OPTIONAL: Final = (
    "nr_lost",
    "disks",
    "policy",
    "policy_version",
    "discard_block_size_bytes",
    "nr_discard_blocks",
    "discarded",
)
_ROWS: Final = msgspec.json.Decoder(list[list[int | str]])
_STATES: Final = state_words()


def parse_cache(pieces: Iterable[bytes]) -> CacheContent:
    """Return the content that a dump, in pieces of any size, describes.

    Raises: BadDump.
    """
    mappings = MappingReader(lambda: fields.get("nr_cblocks", NR_CBLOCKS_MAX))
    discarded = RunReader(NR_DBLOCKS_MAX)
    fields = Fields(
        pieces,
        "cache",
        numbers=_NUMBERS,
        rows={
            "mappings": mappings.rows(),
            "discarded": discarded.rows("[first discard block, number of them]"),
        },
        other={
            "nr_lost": _nr_lost,
            "disks": disks_from_text,
            "dirty_log": _dirty_log,
            "policy": _policy,
            "policy_version": _policy_version,
        },
        optional=_OPTIONAL,
    )
    fields.read()
    _check_sizes(fields, mappings)
    flags = fields["flags"]
    incompat = DIRTY_LOG if fields["dirty_log"] else 0
    _check_dirty(fields, mappings, flags, incompat)
    policy, hints = _hints(fields, mappings, flags)
    return CacheContent(
        uuid=fields["uuid"],
        generation=fields["generation"],
        flags=flags,
        compat=fields["compat"],
        ro_compat=fields["ro_compat"],
        incompat=incompat,
        nr_commits=fields["nr_commits"],
        nr_compactions=fields["nr_compactions"],
        block_size=fields["block_size_bytes"],
        origin_size=fields["origin_size_bytes"],
        values=mappings.values,
        dirty=mappings.dirty,
        policy=policy,
        hints=hints,
        discarded=_discarded(fields, discarded, flags),
        read_hits=fields["read_hits"],
        read_misses=fields["read_misses"],
        write_hits=fields["write_hits"],
        write_misses=fields["write_misses"],
        nr_lost=fields.get("nr_lost", 0),
        doubtful=mappings.doubtful if mappings.doubtful.any() else None,
        disks=fields.get("disks", b""),
    )


class MappingReader:
    """Takes mappings, ascending by cache block.

    Args:
        nr_cblocks: how many cache blocks there are, as far as is known yet.

    Attributes:
        values, dirty, hints, doubtful: up to the last mapped block.
        nr_mapped, nr_hints: how many there are.
        oblock_max: the largest origin block.
    """

    def __init__(self, nr_cblocks: Callable[[], int]) -> None:
        self._nr_cblocks = nr_cblocks
        self.values: Words = array("Q")
        self.hints: Words = array("I")
        self.dirty = bitarray(endian="little")
        self.doubtful = bitarray(endian="little")
        self.nr_mapped = 0
        self.nr_hints = 0
        self.oblock_max = -1

    def rows(self) -> Rows:
        shape = "[cache block, origin block, state] or [… , hint]"
        return Rows(_ROWS, shape, self._take)

    def add(
        self,
        cblock: int,
        oblock: int,
        *,
        dirty: bool,
        logged: bool = False,
        doubtful: bool = False,
        hint: int | None = None,
    ) -> None:
        """Add one. Raises: ValueError."""
        if cblock < len(self.values):
            raise ValueError(f"cache block {cblock} is out of order")
        # Before anything is made room for: the number may be anything.
        if cblock >= self._nr_cblocks():
            raise ValueError(
                f"cache block {cblock} is behind the last of {self._nr_cblocks()}"
            )
        if not 0 <= oblock < NR_OBLOCKS_MAX:
            raise ValueError(f"origin block {oblock} is out of range")
        self.fill(cblock + 1)
        self.values[cblock] = oblock << OBLOCK_SHIFT | (LOGGED if logged else 0) | VALID
        self.dirty[cblock] = dirty
        self.doubtful[cblock] = doubtful
        self.nr_mapped += 1
        self.oblock_max = max(self.oblock_max, oblock)
        if hint is not None:
            self.hints[cblock] = number(hint, 0, HINT_MAX)
            self.nr_hints += 1

    def fill(self, nr_cblocks: int) -> None:
        """Let there be `nr_cblocks` cache blocks, if there are fewer."""
        missing = nr_cblocks - len(self.values)
        if missing > 0:
            self.values.frombytes(bytes(8 * missing))
            self.hints.frombytes(bytes(4 * missing))
            self.dirty.extend(zeros(missing, "little"))
            self.doubtful.extend(zeros(missing, "little"))

    def maybe_twice(self) -> tuple[int, int, int] | None:
        """Return an origin block that two cache blocks hold, and these; None if there is none."""
        values = self.values
        mapped = [cblock for cblock, value in enumerate(values) if value]
        mapped.sort(key=values.__getitem__)
        for first, second in pairwise(mapped):
            oblock = values[first] >> OBLOCK_SHIFT
            if oblock == values[second] >> OBLOCK_SHIFT:
                return oblock, min(first, second), max(first, second)
        return None

    def _take(self, rows: list[list[int | str]]) -> None:
        for nr, row in enumerate(rows):
            try:
                self._take_row(row)
            except ValueError as error:
                raise BadRow(nr, str(error)) from None

    def _take_row(self, row: list[int | str]) -> None:
        if len(row) not in (3, 4):
            raise ValueError(f"expected 3 or 4 things in a row, found {row!r}")
        cblock, oblock, state = row[:3]
        hint = row[3] if len(row) == 4 else None
        if not isinstance(cblock, int) or not isinstance(oblock, int):
            raise ValueError(f"expected a cache and an origin block, found {row!r}")
        if not isinstance(state, str) or state not in _STATES:
            raise ValueError(f"unknown state {state!r}")
        if isinstance(hint, str):
            raise ValueError(f"expected a hint, found {hint!r}")
        dirty, logged, doubtful = _STATES[state]
        self.add(
            cblock, oblock, dirty=dirty, logged=logged, doubtful=doubtful, hint=hint
        )


def _check_sizes(fields: Fields, mappings: MappingReader) -> None:
    block_size, origin_size = fields["block_size_bytes"], fields["origin_size_bytes"]
    fault = block_size_fault(block_size)
    if fault:
        raise fields.bad("block_size_bytes", fault)
    if origin_size // block_size > NR_OBLOCKS_MAX:
        raise fields.bad("origin_size_bytes", f"more than {NR_OBLOCKS_MAX} blocks")
    nr_cblocks = fields["nr_cblocks"]
    if len(mappings.values) > nr_cblocks:
        cblock = len(mappings.values) - 1
        raise fields.bad(
            "mappings", f"cache block {cblock} is behind the last of {nr_cblocks}"
        )
    nr_oblocks = origin_size // block_size
    if mappings.oblock_max >= nr_oblocks:
        raise fields.bad(
            "mappings",
            f"origin block {mappings.oblock_max} is behind the last whole one of"
            f" {nr_oblocks}",
        )
    twice = mappings.maybe_twice()
    if twice is not None:
        oblock, first, second = twice
        raise fields.bad(
            "mappings",
            f"cache blocks {first} and {second} both hold origin block {oblock}",
        )
    mappings.fill(nr_cblocks)
    fields.expect("nr_mapped", mappings.nr_mapped)
    fields.expect("nr_dirty", mappings.dirty.count())


def _check_dirty(
    fields: Fields, mappings: MappingReader, flags: int, incompat: int
) -> None:
    """Refuse dirty bits that would not be the same when they are opened."""
    clean = bool(flags & CLEAN_SHUTDOWN)
    complete = not clean and bool(flags & ORIGIN_COMPLETE)
    for cblock, value in enumerate(mappings.values):
        if not value:
            continue
        dirty, logged = bool(mappings.dirty[cblock]), bool(value & LOGGED)
        if complete:
            if dirty:
                raise fields.bad(
                    "mappings",
                    f"cache block {cblock} is dirty, but flags say origin_complete",
                )
            continue
        if incompat & DIRTY_LOG:
            if dirty and not logged:
                raise fields.bad(
                    "mappings", f"cache block {cblock} is dirty, but not logged"
                )
            if logged and not dirty and not clean:
                raise fields.bad("mappings", _must_be_dirty(cblock))
        elif not dirty and not clean:
            raise fields.bad("mappings", _must_be_dirty(cblock))


def _must_be_dirty(cblock: int) -> str:
    return f"cache block {cblock} counts as dirty, as flags do not say clean_shutdown"


def _hints(
    fields: Fields, mappings: MappingReader, flags: int
) -> tuple[PolicyIdentity, Words | None]:
    if ("policy" in fields) != ("policy_version" in fields):
        present = "policy" if "policy" in fields else "policy_version"
        raise fields.bad(present, "policy and policy_version stand together")
    if "policy" not in fields:
        if mappings.nr_hints:
            raise fields.bad("mappings", "hints without a policy")
        return NO_POLICY, None
    _only_clean(fields, "policy", flags)
    if mappings.nr_hints != mappings.nr_mapped:
        raise fields.bad("mappings", "some mappings have no hint of the policy")
    return PolicyIdentity(fields["policy"], fields["policy_version"]), mappings.hints


def _discarded(fields: Fields, runs: RunReader, flags: int) -> Discarded | None:
    keys = ("discard_block_size_bytes", "nr_discard_blocks", "discarded")
    present = [key for key in keys if key in fields]
    if not present:
        return None
    if len(present) < len(keys):
        raise fields.bad(present[0], f"{', '.join(keys)} stand together")
    _only_clean(fields, "discarded", flags)
    nr_dblocks = fields["nr_discard_blocks"]
    if len(runs.bits) > nr_dblocks:
        raise fields.bad("discarded", f"behind the last of {nr_dblocks}")
    runs.fill(nr_dblocks)
    return Discarded(fields["discard_block_size_bytes"], runs.bits)


def _only_clean(fields: Fields, key: str, flags: int) -> None:
    if not flags & CLEAN_SHUTDOWN:
        raise fields.bad(key, "recorded by a clean_shutdown only")


def _nr_lost(value: Any) -> int | None:
    return None if value is None else number(value, 1, NR_CBLOCKS_MAX)


def _dirty_log(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {value!r}")
    return value


def _policy(value: Any) -> str:
    if isinstance(value, str) and 0 < len(value.encode()) <= POLICY_NAME_MAX:
        return value
    raise ValueError(f"expected a name of at most {POLICY_NAME_MAX} bytes")


def _policy_version(value: Any) -> tuple[int, int, int]:
    if not isinstance(value, list) or len(value) != 3:
        raise ValueError(f"expected three numbers, found {value!r}")
    major, minor, patch = (number(each, 0, HINT_MAX) for each in value)
    return major, minor, patch
