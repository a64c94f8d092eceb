# SPDX-License-Identifier: Apache-2.0
"""A cache's metadata as JSON, for people and for `restore`; what all dumps share: see dump.py.

    {
      "format": "nbdtarget metadata dump",
      "version": 1,
      "kind": "cache",
      "uuid": "000102030405060708090a0b0c0d0e0f",
      "generation": 5,
      "flags": ["clean_shutdown"],
      "compat": 0,
      "ro_compat": 0,
      "nr_commits": 4,
      "nr_compactions": 1,
      "dirty_log": false,
      "block_size_bytes": 65536,
      "origin_size_bytes": 286719488,
      "nr_cblocks": 1000,
      "nr_mapped": 2,
      "nr_dirty": 1,
      "read_hits": 17,
      "read_misses": 4,
      "write_hits": 0,
      "write_misses": 2,
      "policy": "smq",
      "policy_version": [2, 0, 0],
      "discard_block_size_bytes": 65536,
      "nr_discard_blocks": 4375,
      "discarded": [
        [1000, 2000]
      ],
      "mappings": [
        [0, 17, "clean", 3],
        [5, 4000, "dirty", 0]
      ]
    }

A mapping a line, ascending: [cache block, origin block, state], and the
policy's hint where a policy has left some. The state is

    clean      the origin block is the same
    dirty      the cache block is newer, or may be: without clean_shutdown, each is, or with
               dirty_log each that is logged; with origin_complete none is
    logged     behind one of these: it is on record, in advance, that it may be dirty
    doubtful   behind these, after a repair: the cache block may hold another origin block by
               now. Restored as it stands; to give it up, remove the line and count anew

With the flag origin_complete, and without clean_shutdown, the origin has everything, but the cache blocks
may differ from it: the next start gives all mappings up.

"nr_lost" and "disks", if they are there, stand behind "nr_dirty". "policy", "policy_version" and the discard blocks are there only if a clean shutdown
recorded them.
"""

from collections.abc import Iterator
from typing import Final

from bitarray.util import intervals

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.records import LOGGED, OBLOCK_SHIFT
from nbdtarget_metadata.cache.superblock import DIRTY_LOG
from nbdtarget_metadata.tools.dump import (
    common_fields,
    loss_fields,
    render_fields,
    render_rows,
)

__all__ = ["render_cache", "state_words"]


def render_cache(content: CacheContent) -> Iterator[str]:
    """Yield the text in pieces: mappings are many, memory is not."""
    fields = common_fields("cache", content)
    fields["dirty_log"] = bool(content.incompat & DIRTY_LOG)
    fields["block_size_bytes"] = content.block_size
    fields["origin_size_bytes"] = content.origin_size
    fields["nr_cblocks"] = content.nr_cblocks
    fields["nr_mapped"] = content.nr_mapped
    fields["nr_dirty"] = content.dirty.count()
    fields |= loss_fields(content)
    fields["read_hits"] = content.read_hits
    fields["read_misses"] = content.read_misses
    fields["write_hits"] = content.write_hits
    fields["write_misses"] = content.write_misses
    if content.hints is not None:
        fields["policy"] = content.policy.name
        fields["policy_version"] = list(content.policy.version)
    discarded = content.discarded
    if discarded is not None:
        fields["discard_block_size_bytes"] = discarded.block_size
        fields["nr_discard_blocks"] = len(discarded.bits)
    yield render_fields(fields)
    if discarded is not None:
        runs = intervals(discarded.bits)
        lines = (f"[{begin}, {end - begin}]" for value, begin, end in runs if value)
        yield from render_rows("discarded", lines)
        yield ",\n"
    yield from render_rows("mappings", _mappings(content))
    yield "\n}\n"


STATES: Final = {
    (dirty, logged, doubtful): " ".join(
        word
        for word, is_said in (
            ("dirty" if dirty else "clean", True),
            ("logged", logged),
            ("doubtful", doubtful),
        )
        if is_said
    )
    for dirty in (False, True)
    for logged in (False, True)
    for doubtful in (False, True)
}


def state_words() -> dict[str, tuple[bool, bool, bool]]:
    """Return what each state says: dirty, logged, doubtful."""
    return {words: state for state, words in STATES.items()}


def _mappings(content: CacheContent) -> Iterator[str]:
    dirty, hints, doubtful = content.dirty, content.hints, content.doubtful
    for cblock, value in enumerate(content.values):
        if not value:
            continue
        state = STATES[
            bool(dirty[cblock]),
            bool(value & LOGGED),
            doubtful is not None and bool(doubtful[cblock]),
        ]
        hint = "" if hints is None else f", {hints[cblock]}"
        yield f'[{cblock}, {value >> OBLOCK_SHIFT}, "{state}"{hint}]'
