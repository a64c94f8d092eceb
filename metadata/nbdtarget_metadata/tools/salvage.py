# SPDX-License-Identifier: Apache-2.0
"""Which records of a damaged arena may still be believed, for any kind.

A superblock vouches for a record by its digest, or by a chain of digests that leads to it:

    backward   the records with `journal_digest` and `snapshot_digest`, and each predecessor of
               one that is vouched for, down to a broken one
    forward    each record whose predecessor is vouched for, beginning at the uuid, up to a
               broken one; unless its successor names another predecessor

What follows from that for regions and for cache blocks: see clone_salvage.py and cache_salvage.py.
"""

from collections.abc import Iterable
from typing import Generic, NamedTuple, TypeVar

from nbdtarget_metadata.log.superblock import Superblock

__all__ = ["Link", "Salvaged", "backward", "forward"]

C = TypeVar("C")


class Salvaged(NamedTuple, Generic[C]):
    """The part that could be read.

    Attributes:
        content: `nr_lost` says how many hydrated regions (mapped cache blocks) are missing; its
            flags say neither `needs_check` nor, if any are missing, `clean_shutdown`.
        damage: what was broken, a line each; none: the input was intact.
    """

    content: C
    damage: tuple[str, ...]


class Link(NamedTuple):
    """An intact record without its content, which may be half a megabyte."""

    block: int
    end: int
    digest: bytes
    previous: bytes


def backward(links: Iterable[Link], superblock: Superblock) -> set[int]:
    """Return the blocks of the records that digests lead to, from the ends of both chains."""
    by_digest = {link.digest: link for link in links}
    believed: set[int] = set()
    for digest in (superblock.journal_digest, superblock.snapshot_digest):
        link = by_digest.get(digest)
        while link is not None and link.block not in believed:
            believed.add(link.block)
            link = by_digest.get(link.previous)
    return believed


def forward(links: list[Link], believed: set[int], superblock: Superblock) -> set[int]:
    """Return the blocks of the records that follow on the beginning or on believed ones."""
    by_block = {link.block: link for link in links}
    # A record at this block may name one of these as its predecessor.
    expected = {
        superblock.journal_block: superblock.snapshot_digest,
        superblock.snapshot_block: superblock.uuid,
    }
    if not superblock.snapshot_blocks:
        expected[superblock.journal_block] = superblock.uuid
    found: set[int] = set()
    for link in links:
        if link.block not in believed:
            if expected.get(link.block) != link.previous:
                continue
            follower = by_block.get(link.end)
            if follower is not None and follower.previous != link.digest:
                continue  # an old record, where the write of a newer one was lost
            found.add(link.block)
        expected.setdefault(link.end, link.digest)
    return found
