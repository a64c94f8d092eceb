# SPDX-License-Identifier: Apache-2.0
"""The superblock of a cache, and where the parts of its metadata lie.

block 0            4         4 + A     4 + 2 A       4 + 2 A + Y   4 + 2 A + 2 Y
      | superblocks | arena 0 | arena 1 | sync area 0 | sync area 1 | unused |

A = 2 S + J, as log/layout.py explains: S is the longest snapshot of `nr_cblocks_max` cache blocks, J
what a journal has at least. Y is the most that a clean shutdown writes (records.py). Both follow
from `nr_cblocks_max`, to which the cache may grow, and that from the device's size when it is formatted.
A clean shutdown never overwrites the sync area that the superblock before it vouches for.
"""

from typing import Final, NamedTuple

import msgspec

from nbdtarget_metadata.cache.records import (
    NR_CBLOCKS_MAX,
    NR_OBLOCKS_MAX,
    snapshot_blocks_max,
    sync_blocks_max,
)
from nbdtarget_metadata.errors import CorruptMetadata, MetadataTooSmall
from nbdtarget_metadata.log.envelope import BLOCK_SIZE, DIGEST_SIZE
from nbdtarget_metadata.log.layout import (
    JOURNAL_BLOCKS_MIN,
    JOURNAL_BLOCKS_PREFERRED,
    NR_ARENAS,
)
from nbdtarget_metadata.log.superblock import (
    CLEAN_SHUTDOWN,
    COUNTER_MAX,
    SUPERBLOCK_BLOCKS,
    Superblock,
    SuperblockType,
    check_ranges,
)
from nbdtarget_metadata.units import BLOCK_SIZE_MAX, BLOCK_SIZE_MIN

__all__ = [
    "CACHE",
    "DIRTY_LOG",
    "NO_POLICY",
    "NR_DBLOCKS_MAX",
    "ORIGIN_COMPLETE",
    "CacheSuperblock",
    "PolicyIdentity",
    "check_device_size",
    "device_size_with",
    "first_superblock",
    "journal_blocks_preferred",
    "layout_for",
]

POLICY_NAME_MAX: Final = 16
HINT_SIZE: Final = 4
NR_SYNC_AREAS: Final = 2

# Feature bit, incompat: a block may be dirty after a crash only if its mapping says so. A version that
# does not know this would dirty blocks without noting it, and this version would take them for clean.
DIRTY_LOG: Final = 1

# Flag: no cached block has what the origin has not.
ORIGIN_COMPLETE: Final = 4

# Doubled while there are more than 2^14 of them; the last one may be short (discards.py).
NR_DBLOCKS_MAX: Final = (1 << 15) + 1


class PolicyIdentity(NamedTuple):
    """The policy whose hints are stored. Only a policy of the same name, major version and hint size believes them."""

    name: str
    version: tuple[int, int, int]
    hint_size: int = HINT_SIZE

    def understands(self, stored: "PolicyIdentity") -> bool:
        """Whether hints of `stored` mean the same to this one."""
        return (
            bool(self.name)
            and self.name == stored.name
            and self.version[0] == stored.version[0]
            and self.hint_size == stored.hint_size
        )


NO_POLICY: Final = PolicyIdentity("", (0, 0, 0))


class CacheSuperblock(
    Superblock, array_like=True, frozen=True, gc=False, kw_only=True, tag="cache"
):
    """The superblock of a cache. New fields go to the end and have defaults."""

    block_size: int
    origin_size: int
    nr_cblocks: int
    nr_cblocks_max: int
    nr_mapped: int
    nr_logged: int
    nr_dirty: int
    sync_area: int
    sync_blocks: int
    sync_digest: bytes
    policy_name: str
    policy_version: tuple[int, int, int]
    hint_size: int
    discard_block_size: int
    nr_dblocks: int
    read_hits: int
    read_misses: int
    write_hits: int
    write_misses: int
    disks: bytes = b""

    @property
    def nr_oblocks(self) -> int:
        """Whole blocks of the origin: a short tail is never cached."""
        return self.origin_size // self.block_size

    @property
    def gives_up_mappings(self) -> bool:
        """Whether a cache that did not write back has ended in a crash: only the origin counts."""
        return self.flags & (CLEAN_SHUTDOWN | ORIGIN_COMPLETE) == ORIGIN_COMPLETE

    @property
    def sync_begin(self) -> int:
        """The first block of the live sync area."""
        return self.sync_area_begin(self.sync_area)

    @property
    def device_blocks(self) -> int:
        """Blocks of the smallest device that holds it."""
        return self.sync_area_begin(NR_SYNC_AREAS)

    def sync_area_begin(self, area: int) -> int:
        """Return the first block of a sync area."""
        blocks = SUPERBLOCK_BLOCKS + NR_ARENAS * self.arena_blocks
        return blocks + area * sync_blocks_max(self.nr_cblocks_max)

    @property
    def policy(self) -> PolicyIdentity:
        """The policy whose hints are stored."""
        return PolicyIdentity(self.policy_name, self.policy_version, self.hint_size)


def device_size_with(nr_cblocks_max: int, journal_blocks: int) -> int:
    """Return the bytes of a metadata device whose journals have `journal_blocks` at least."""
    arena_blocks = 2 * snapshot_blocks_max(nr_cblocks_max) + journal_blocks
    sync_blocks = NR_SYNC_AREAS * sync_blocks_max(nr_cblocks_max)
    return (SUPERBLOCK_BLOCKS + NR_ARENAS * arena_blocks + sync_blocks) * BLOCK_SIZE


def journal_blocks_preferred(nr_cblocks_max: int) -> int:
    """Return how long a journal should be: a compaction costs about as much as it then frees."""
    return max(JOURNAL_BLOCKS_PREFERRED, snapshot_blocks_max(nr_cblocks_max))


class Layout(NamedTuple):
    """The parameters that are chosen when metadata is formatted."""

    arena_blocks: int
    nr_cblocks_max: int


def layout_for(nr_cblocks: int, device_size: int) -> Layout:
    """Choose the layout for `nr_cblocks` on a device of `device_size` bytes.

    As much growth as the device has room for beside a journal of the preferred length.

    Raises: MetadataTooSmall.
    """
    needed = device_size_with(nr_cblocks, JOURNAL_BLOCKS_MIN)
    if device_size < needed:
        raise MetadataTooSmall(needed=needed, given=device_size)
    low, high = nr_cblocks, NR_CBLOCKS_MAX
    while low < high:  # the largest that fits comfortably; nr_cblocks if none does
        middle = (low + high + 1) // 2
        if device_size_with(middle, journal_blocks_preferred(middle)) <= device_size:
            low = middle
        else:
            high = middle - 1
    blocks = device_size // BLOCK_SIZE - SUPERBLOCK_BLOCKS
    blocks -= NR_SYNC_AREAS * sync_blocks_max(low)
    longest = 2 * snapshot_blocks_max(low) + journal_blocks_preferred(low)
    return Layout(min(blocks // NR_ARENAS, longest), low)


def check_device_size(superblock: CacheSuperblock, device_size: int) -> None:
    """Raise MetadataTooSmall if the metadata goes on behind the device's end: it has shrunk."""
    needed = superblock.device_blocks * BLOCK_SIZE
    if device_size < needed:
        raise MetadataTooSmall(needed=needed, given=device_size)


def first_superblock(
    uuid: bytes,
    *,
    block_size: int,
    origin_size: int,
    nr_cblocks: int,
    nr_cblocks_max: int,
    arena_blocks: int,
) -> CacheSuperblock:
    """Return generation 0 of an empty cache."""
    return CacheSuperblock(
        generation=0,
        uuid=uuid,
        flags=CLEAN_SHUTDOWN,
        compat=0,
        ro_compat=0,
        incompat=0,
        nr_commits=0,
        nr_compactions=0,
        arena_blocks=arena_blocks,
        arena=0,
        snapshot_block=SUPERBLOCK_BLOCKS,
        snapshot_blocks=0,
        snapshot_digest=uuid,
        journal_blocks=0,
        journal_digest=uuid,
        block_size=block_size,
        origin_size=origin_size,
        nr_cblocks=nr_cblocks,
        nr_cblocks_max=nr_cblocks_max,
        nr_mapped=0,
        nr_logged=0,
        nr_dirty=0,
        sync_area=0,
        sync_blocks=0,
        sync_digest=uuid,
        policy_name="",
        policy_version=(0, 0, 0),
        hint_size=HINT_SIZE,
        discard_block_size=0,
        nr_dblocks=0,
        read_hits=0,
        read_misses=0,
        write_hits=0,
        write_misses=0,
    )


def _check(superblock: CacheSuperblock) -> None:
    sb = superblock
    clean = bool(sb.flags & CLEAN_SHUTDOWN)
    nr_cblocks_max = sb.nr_cblocks_max
    rules = {
        "block_size": BLOCK_SIZE_MIN <= sb.block_size <= BLOCK_SIZE_MAX
        and sb.block_size % BLOCK_SIZE_MIN == 0,
        "nr_cblocks_max": 0 < nr_cblocks_max <= NR_CBLOCKS_MAX,
        "nr_cblocks": 0 < sb.nr_cblocks <= nr_cblocks_max,
        "nr_mapped": 0 <= sb.nr_mapped <= sb.nr_cblocks,
        "nr_logged": 0 <= sb.nr_logged <= sb.nr_mapped,
        "nr_dirty": 0 <= sb.nr_dirty <= (sb.nr_mapped if clean else 0),
        "sync_area": sb.sync_area in range(NR_SYNC_AREAS),
        "sync_digest": len(sb.sync_digest) == DIGEST_SIZE,
        "policy_name": len(sb.policy_name.encode()) <= POLICY_NAME_MAX,
        "policy_version": all(0 <= each < 1 << 32 for each in sb.policy_version),
        "hint_size": sb.hint_size == HINT_SIZE,
        "discard_block_size": 0 <= sb.discard_block_size <= COUNTER_MAX,
        "nr_dblocks": 0 <= sb.nr_dblocks <= (NR_DBLOCKS_MAX if clean else 0),
        "read_hits": 0 <= sb.read_hits <= COUNTER_MAX,
        "read_misses": 0 <= sb.read_misses <= COUNTER_MAX,
        "write_hits": 0 <= sb.write_hits <= COUNTER_MAX,
        "write_misses": 0 <= sb.write_misses <= COUNTER_MAX,
    }
    check_ranges(sb, rules)
    check_ranges(
        sb,
        {
            "origin_size": sb.origin_size > 0 and sb.nr_oblocks <= NR_OBLOCKS_MAX,
            "sync_blocks": 0
            <= sb.sync_blocks
            <= (sync_blocks_max(nr_cblocks_max) if clean else 0),
        },
    )
    # An arena has room for all mappings: so the device bounds the memory that they take.
    needed = 2 * snapshot_blocks_max(nr_cblocks_max)
    if sb.arena_blocks < needed:
        raise CorruptMetadata(
            f"arena_blocks of superblock generation {sb.generation}",
            f"at least {needed}",
            sb.arena_blocks,
        )


CACHE: Final = SuperblockType(
    tag="cache",
    decoder=msgspec.msgpack.Decoder(CacheSuperblock),
    fixed=("uuid", "block_size", "nr_cblocks_max", "arena_blocks"),
    incompat_known=DIRTY_LOG,
    check=_check,
)
