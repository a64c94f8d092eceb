# SPDX-License-Identifier: Apache-2.0
"""Read the metadata of the kernel's own dm-cache and dm-clone, so that a disk can move in from there.

What is believed, and why
=========================

Everything that the superblock leads to is verified: checksum, own number, order of keys, range of entries. Then
the kernel's rules say what it means (they are the same after a crash and after an orderly end, as the
superblock is only written when all it leads to is durable):

    mappings           believed
    dirty bits         believed after a clean shutdown: in format 1 they stand in the mappings, in format 2 in
                       a bitset of their own. Else each mapped block counts as dirty.
    hints, discards,   believed after a clean shutdown, else forgotten
    policy
    needs_check        the kernel has failed to write this metadata at some time: what is there is whole, but
                       not of a clean shutdown
    regions (clone)    believed

The superblock of a cache does not say how large the origin is, so the caller does.

Source: the formats as Linux documents and writes them (dm-cache-metadata, dm-clone-metadata; 6.1 and 6.12).
"""

from array import array
from struct import Struct, unpack_from
from typing import Final, NamedTuple

from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.load import Discarded
from nbdtarget_metadata.cache.records import NR_CBLOCKS_MAX, Words
from nbdtarget_metadata.cache.superblock import (
    HINT_SIZE,
    NO_POLICY,
    NR_DBLOCKS_MAX,
    PolicyIdentity,
)
from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.errors import CorruptMetadata, NotTheKernels, UnsupportedFormat
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Steps, read
from nbdtarget_metadata.tools.cache_dump_parser import MappingReader
from nbdtarget_metadata.tools.kernel_blocks import (
    BLOCK_SIZE,
    read_array,
    read_bitset,
    read_block,
)
from nbdtarget_metadata.units import SECTOR, block_size_fault, region_size_fault

__all__ = ["Imported", "find_kernel_kind", "import_cache", "import_clone"]

CACHE_MAGIC: Final = 0o6142003
CLONE_MAGIC: Final = 0x8AF27F64
MAGIC_AT: Final = 32
_NUMBER_AT: Final = 8  # where a superblock says its own block number

_CACHE_XOR: Final = 9031977
_CLONE_XOR: Final = 257649492

# csum, flags, blocknr, uuid, magic, version, policy name, hint size, space map root, mapping root, hint root,
# discard root, discard block size, discard blocks, data block size, metadata block size, cache blocks,
# compat, compat_ro, incompat, read hits, read misses, write hits, write misses, policy version, dirty root
_CACHE: Final = Struct("<IIQ16sQI16sI128sQQQQQIIIIIIIIII3IQ")
# csum, flags, blocknr, uuid, magic, version, space map root, region size, target size, bitset root
_CLONE: Final = Struct("<IIQ16sQI128sQQQ")

_KERNEL_CLEAN: Final = 1
_KERNEL_NEEDS_CHECK: Final = 2
_VALID: Final = 1
_DIRTY: Final = 2
_OBLOCK_SHIFT: Final = 16


class Imported(NamedTuple):
    """The metadata that was read.

    Args:
        content: what `metadata restore` writes.
        clean: the kernel has shut it down in order, so dirty bits and hints are those that it recorded.
        needs_check: the kernel had failed to write this metadata.
        version: of the format.
    """

    content: CacheContent | CloneContent
    clean: bool
    needs_check: bool
    version: int


def find_kernel_kind(device_size: int) -> Steps[str]:
    """Return whose metadata this is, "cache" or "clone", by its magic number. Raises: NotTheKernels."""
    if device_size < BLOCK_SIZE:
        raise NotTheKernels(f"it has {device_size} bytes")
    head = yield from read(0, BLOCK_SIZE)
    (magic,) = unpack_from("<Q", head, MAGIC_AT)
    if magic == CACHE_MAGIC:
        return "cache"
    if magic == CLONE_MAGIC:
        return "clone"
    raise NotTheKernels("it is blank" if not any(head) else f"magic number {magic:#x}")


def import_clone(device_size: int, *, uuid: bytes) -> Steps[Imported]:
    """Read the metadata of a dm-clone. `uuid`: of the metadata to be.

    Raises: CorruptMetadata, UnsupportedFormat.
    """
    block = yield from read_block(
        0, device_size, "superblock", xor=_CLONE_XOR, number_at=_NUMBER_AT
    )
    fields = _CLONE.unpack_from(block)
    version, region_sectors, target_sectors, bitset_root = fields[5], *fields[7:]
    if version != 1:
        raise UnsupportedFormat(version, 0)
    region_size, target_size = region_sectors * SECTOR, target_sectors * SECTOR
    fault = region_size_fault(region_size)
    nr_regions = 0 if fault else -(-target_size // region_size)
    if not 0 < nr_regions <= NR_REGIONS_MAX:
        raise CorruptMetadata(
            "sizes in the superblock",
            f"1 to {NR_REGIONS_MAX} regions of 4 KiB to 1 GiB",
            f"{target_size} bytes in regions of {region_size}",
        )
    hydrated = yield from read_bitset(
        bitset_root, device_size, "the regions", nr_bits=nr_regions
    )
    content = CloneContent(
        uuid=uuid,
        generation=1,
        flags=0,
        compat=0,
        ro_compat=0,
        nr_commits=0,
        nr_compactions=0,
        region_size=region_size,
        target_size=target_size,
        hydrated=hydrated,
    )
    return Imported(content, clean=True, needs_check=False, version=version)


class _CacheSuperblock(NamedTuple):
    """The fields of a cache's superblock that are used here. Sizes are in bytes."""

    flags: int
    version: int
    policy: PolicyIdentity
    mapping_root: int
    hint_root: int
    discard_root: int
    discard_block_size: int
    nr_dblocks: int
    block_size: int
    nr_cblocks: int
    statistics: tuple[int, int, int, int]
    dirty_root: int

    @property
    def is_clean(self) -> bool:
        return self.flags & (_KERNEL_CLEAN | _KERNEL_NEEDS_CHECK) == _KERNEL_CLEAN


def import_cache(device_size: int, *, uuid: bytes, origin_size: int) -> Steps[Imported]:
    """Read the metadata of a dm-cache. `uuid`: of the metadata to be; `origin_size`: bytes.

    Raises: CorruptMetadata, UnsupportedFormat.
    """
    superblock = yield from _read_cache_superblock(device_size)
    mappings = yield from _read_mappings(superblock, device_size, origin_size)
    hints: Words | None = None
    discarded: Discarded | None = None
    if superblock.is_clean:
        hints = yield from _read_hints(superblock, device_size, mappings.values)
        discarded = yield from _read_discards(superblock, device_size)
    read_hits, read_misses, write_hits, write_misses = superblock.statistics
    content = CacheContent(
        uuid=uuid,
        generation=1,
        flags=CLEAN_SHUTDOWN if superblock.is_clean else 0,
        compat=0,
        ro_compat=0,
        incompat=0,
        nr_commits=0,
        nr_compactions=0,
        block_size=superblock.block_size,
        origin_size=origin_size,
        values=mappings.values,
        dirty=mappings.dirty,
        policy=superblock.policy if hints is not None else NO_POLICY,
        hints=hints,
        discarded=discarded,
        read_hits=read_hits,
        read_misses=read_misses,
        write_hits=write_hits,
        write_misses=write_misses,
    )
    return Imported(
        content,
        clean=superblock.is_clean,
        needs_check=bool(superblock.flags & _KERNEL_NEEDS_CHECK),
        version=superblock.version,
    )


def _read_cache_superblock(device_size: int) -> Steps[_CacheSuperblock]:
    block = yield from read_block(
        0, device_size, "superblock", xor=_CACHE_XOR, number_at=_NUMBER_AT
    )
    fields = _CACHE.unpack_from(block)
    flags, version, name, hint_size = fields[1], fields[5], fields[6], fields[7]
    if version not in (1, 2):
        raise UnsupportedFormat(version, 0)
    compat_ro, incompat = fields[18:20]
    if compat_ro | incompat:
        raise UnsupportedFormat(version, compat_ro | incompat)
    superblock = _CacheSuperblock(
        flags=flags,
        version=version,
        policy=PolicyIdentity(
            name.partition(b"\0")[0].decode("ascii", "replace"),
            (fields[24], fields[25], fields[26]),
            hint_size,
        ),
        mapping_root=fields[9],
        hint_root=fields[10],
        discard_root=fields[11],
        discard_block_size=fields[12] * SECTOR,
        nr_dblocks=fields[13],
        block_size=fields[14] * SECTOR,
        nr_cblocks=fields[16],
        statistics=(fields[20], fields[21], fields[22], fields[23]),
        dirty_root=fields[27],
    )
    fault = block_size_fault(superblock.block_size)
    if fault:
        raise CorruptMetadata(
            "block size in the superblock", fault, superblock.block_size
        )
    if superblock.nr_cblocks > NR_CBLOCKS_MAX:
        raise CorruptMetadata(
            "cache blocks in the superblock",
            f"at most {NR_CBLOCKS_MAX}",
            superblock.nr_cblocks,
        )
    if not superblock.nr_cblocks:
        raise CorruptMetadata("cache blocks in the superblock", "one at least", 0)
    return superblock


def _read_mappings(
    superblock: _CacheSuperblock, device_size: int, origin_size: int
) -> Steps[MappingReader]:
    nr_cblocks = superblock.nr_cblocks
    nr_oblocks = origin_size // superblock.block_size
    packed: Words = array("Q")
    yield from read_array(
        superblock.mapping_root,
        device_size,
        "the mappings",
        value_size=8,
        nr_entries=nr_cblocks,
        take=packed.frombytes,
    )
    recorded = zeros(nr_cblocks, "little")
    if superblock.version == 2 and superblock.is_clean:
        recorded = yield from read_bitset(
            superblock.dirty_root, device_size, "the dirty bits", nr_bits=nr_cblocks
        )
    mappings = MappingReader(lambda: nr_cblocks)
    for cblock, value in enumerate(packed):
        if not value & _VALID:
            continue
        oblock = value >> _OBLOCK_SHIFT
        if oblock >= nr_oblocks:
            raise CorruptMetadata(
                f"origin block of cache block {cblock}",
                f"before {nr_oblocks} (the origin has {origin_size} bytes)",
                oblock,
            )
        dirty = (
            not superblock.is_clean
            or bool(recorded[cblock])
            or (superblock.version == 1 and bool(value & _DIRTY))
        )
        mappings.add(cblock, oblock, dirty=dirty)
    mappings.fill(nr_cblocks)
    twice = mappings.maybe_twice()
    if twice is not None:
        oblock, first, second = twice
        raise CorruptMetadata(
            f"holder of origin block {oblock}",
            "one cache block",
            f"{first} and {second}",
        )
    return mappings


def _read_hints(
    superblock: _CacheSuperblock, device_size: int, values: Words
) -> Steps[Words | None]:
    """Return a hint for each cache block, 0 for those that hold nothing; None without hints."""
    if not (
        superblock.hint_root
        and superblock.policy.name
        and superblock.policy.hint_size == HINT_SIZE
    ):
        return None
    hints: Words = array("I")
    yield from read_array(
        superblock.hint_root,
        device_size,
        "the hints",
        value_size=HINT_SIZE,
        nr_entries=superblock.nr_cblocks,
        take=hints.frombytes,
    )
    for cblock, value in enumerate(values):
        if not value:
            hints[cblock] = 0
    return hints


def _read_discards(
    superblock: _CacheSuperblock, device_size: int
) -> Steps[Discarded | None]:
    nr_dblocks = superblock.nr_dblocks
    if not nr_dblocks or not superblock.discard_block_size:
        return None
    if nr_dblocks > NR_DBLOCKS_MAX:
        raise CorruptMetadata(
            "discard blocks in the superblock", f"at most {NR_DBLOCKS_MAX}", nr_dblocks
        )
    bits: bitarray = yield from read_bitset(
        superblock.discard_root, device_size, "the discards", nr_bits=nr_dblocks
    )
    return Discarded(superblock.discard_block_size, bits)
