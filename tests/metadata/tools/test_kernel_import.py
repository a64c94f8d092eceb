# SPDX-License-Identifier: Apache-2.0
"""Metadata of the kernel's own dm-cache and dm-clone becomes ours, or is refused by name."""

import gzip
import random
import struct

import pytest

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.superblock import NO_POLICY
from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.errors import CorruptMetadata, NotTheKernels, UnsupportedFormat
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.tools.kernel_blocks import checksum
from nbdtarget_metadata.tools.kernel_import import (
    Imported,
    find_kernel_kind,
    import_cache,
    import_clone,
)
from tests.support.metadata.kernel_images import CACHED, DIRTY, FOLDER, MADE
from tests.support.metadata.kernel_writer import BLOCK, KernelWriter, crc32c
from tests.support.metadata.store import read_image

ORIGIN_SIZE = 48 << 20
UUID = bytes(range(16))


def image_of(name: str) -> bytes:
    return gzip.decompress((FOLDER / f"{name}.gz").read_bytes())


def imported(image: bytes, origin_size: int = ORIGIN_SIZE) -> Imported:
    if read_image(image, find_kernel_kind(len(image))) == "clone":
        return read_image(image, import_clone(len(image), uuid=UUID))
    steps = import_cache(len(image), uuid=UUID, origin_size=origin_size)
    return read_image(image, steps)


def cache_of(image: bytes) -> CacheContent:
    content = imported(image).content
    assert isinstance(content, CacheContent)
    return content


# Metadata that kernels 6.1 and 6.12 wrote


def test_every_kernel_format_and_end_is_there() -> None:
    assert len(MADE) == 8


@pytest.mark.parametrize("name", MADE)
def test_a_kernels_cache_arrives_whole(name: str) -> None:
    _, version, end = name.split("-")
    found = imported(image_of(name))
    content = found.content
    assert isinstance(content, CacheContent)
    assert (found.version, found.clean) == (int(version), end == "clean")
    assert not found.needs_check
    assert (content.block_size, content.nr_cblocks) == (32 << 10, 128)
    held = {value >> 16: nr for nr, value in enumerate(content.values) if value}
    assert set(held) == CACHED
    dirty = {oblock for oblock, cblock in held.items() if content.dirty[cblock]}
    if end == "crash":
        assert dirty == CACHED  # as for the kernel itself
        assert (content.flags, content.policy) == (0, NO_POLICY)
        assert (content.hints, content.discarded) == (None, None)
        return
    assert dirty == DIRTY
    assert content.flags == CLEAN_SHUTDOWN
    assert (content.policy.name, content.policy.version) == ("smq", (2, 0, 0))
    assert content.hints is not None
    assert all(content.hints[cblock] for cblock in held.values())
    assert content.discarded is not None
    assert content.discarded.block_size == 32 << 10
    assert [at for at, bit in enumerate(content.discarded.bits) if bit] == list(
        range(1000, 1064)
    )
    assert content.read_hits + content.read_misses > 60
    assert content.write_hits == 18


@pytest.mark.parametrize("name", MADE)
def test_any_changed_byte_of_what_is_read_is_noticed(name: str) -> None:
    image = image_of(name)
    used = [
        at
        for at in range(0, len(image), BLOCK)
        if any(image[at : at + BLOCK]) and at // BLOCK
    ]
    expected = imported(image).content
    noise = random.Random(7)
    refused = 0
    for at in (0, *used):
        spoilt = bytearray(image)
        spoilt[at + noise.randrange(BLOCK)] ^= 1 << noise.randrange(8)
        try:
            # A block that nothing leads to (an older state, the space map) may say anything.
            assert imported(bytes(spoilt)).content == expected
        except (CorruptMetadata, NotTheKernels, UnsupportedFormat):
            refused += 1
    assert refused >= 3  # superblock, tree and array of the mappings


def test_a_cache_that_the_kernel_could_not_write_counts_as_dirty() -> None:
    writer = KernelWriter()
    writer.cache_superblock([3 << 16 | 1, 0], flags=3, dirty=[False, False])
    found = imported(writer.image())
    assert (found.clean, found.needs_check) == (False, True)
    assert cache_of(writer.image()).dirty.count() == 1


# Shapes that are hard to come by


@pytest.mark.parametrize("nr_cblocks", [1, 9, 63, 64, 65])
@pytest.mark.parametrize("version", [1, 2])
def test_deep_trees_are_read_in_order(nr_cblocks: int, version: int) -> None:
    noise = random.Random(nr_cblocks)
    oblocks = noise.sample(range(1536), nr_cblocks)
    dirty = [noise.random() < 0.3 for _ in oblocks]
    flag = [2 if version == 1 and each else 0 for each in dirty]
    writer = KernelWriter(fanout=2, per_block=3)
    writer.cache_superblock(
        [oblock << 16 | bits | 1 for oblock, bits in zip(oblocks, flag, strict=True)],
        version=version,
        dirty=dirty if version == 2 else (),
        hints=list(range(nr_cblocks)),
    )
    content = cache_of(writer.image())
    assert [value >> 16 for value in content.values] == oblocks
    assert [bool(each) for each in content.dirty] == dirty
    assert content.hints is not None
    assert list(content.hints) == list(range(nr_cblocks))


@pytest.mark.parametrize("nr_regions", [1, 64, 65, 300])
def test_a_clone_of_the_kernel_arrives_whole(nr_regions: int) -> None:
    noise = random.Random(nr_regions)
    bits = [noise.random() < 0.5 for _ in range(nr_regions)]
    writer = KernelWriter(fanout=2, per_block=2)
    writer.clone_superblock(
        bits, region_sectors=8, target_sectors=8 * nr_regions - (nr_regions > 1)
    )
    content = imported(writer.image()).content
    assert isinstance(content, CloneContent)
    assert [bool(each) for each in content.hydrated] == bits
    assert content.region_size == 4096
    assert content.target_size == 512 * (8 * nr_regions - (nr_regions > 1))


def test_the_checksum_is_crc32c() -> None:
    # The check value of CRC-32C (RFC 3720) is of the inverted remainder.
    assert checksum(bytes(4) + b"123456789", 0) ^ 0xFFFFFFFF == 0xE3069283
    assert crc32c(b"123456789") ^ 0xFFFFFFFF == 0xE3069283


# Refusals


def test_other_content_is_no_metadata_of_the_kernels() -> None:
    for image, words in (
        (bytes(BLOCK), "it is blank"),
        (b"\1" * BLOCK, "magic number 0x101010101010101"),
        (b"", "it has 0 bytes"),
    ):
        with pytest.raises(NotTheKernels) as caught:
            read_image(image, find_kernel_kind(len(image)))
        assert words in str(caught.value)


def small_cache(
    mappings: list[int], *, version: int = 2, incompat: int = 0, block_sectors: int = 64
) -> bytes:
    writer = KernelWriter()
    writer.cache_superblock(
        mappings,
        dirty=[False] * len(mappings),
        version=version,
        incompat=incompat,
        block_sectors=block_sectors,
    )
    return writer.image()


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (small_cache([1 << 16 | 1, 1 << 16 | 1]), "holder of origin block 1"),
        (small_cache([1536 << 16 | 1]), "the origin has 50331648 bytes"),
        (small_cache([1], block_sectors=100), "block size in the superblock"),
    ],
)
def test_content_that_cannot_be_is_refused_by_name(image: bytes, words: str) -> None:
    with pytest.raises(CorruptMetadata) as caught:
        imported(image)
    assert words in str(caught.value)


@pytest.mark.parametrize("options", [{"version": 3}, {"incompat": 4}])
def test_unknown_versions_and_features_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(UnsupportedFormat):
        imported(small_cache([1 << 16 | 1], **options))


def test_a_clone_of_an_unknown_version_is_refused() -> None:
    writer = KernelWriter()
    writer.clone_superblock([True], region_sectors=8, target_sectors=8, version=2)
    with pytest.raises(UnsupportedFormat):
        imported(writer.image())


@pytest.mark.parametrize(("region_sectors", "target_sectors"), [(7, 70), (8, 0)])
def test_a_clone_of_impossible_sizes_is_refused(
    region_sectors: int, target_sectors: int
) -> None:
    writer = KernelWriter()
    writer.clone_superblock(
        [True], region_sectors=region_sectors, target_sectors=target_sectors
    )
    with pytest.raises(CorruptMetadata, match="sizes in the superblock"):
        imported(writer.image())


def test_a_tree_that_leads_to_itself_is_refused() -> None:
    writer = KernelWriter(fanout=2, per_block=3)
    writer.cache_superblock([each << 16 | 1 for each in range(40)], dirty=[False] * 40)
    image = bytearray(writer.image())
    (root,) = struct.unpack_from("<Q", image, 192)
    body = bytearray(image[root * BLOCK + 4 : (root + 1) * BLOCK])
    assert struct.unpack_from("<I", body)[0] == 1  # an internal node
    struct.pack_into("<Q", body, 28 + 8 * 252, root)
    image[root * BLOCK : (root + 1) * BLOCK] = writer.seal(bytes(body), "node")
    with pytest.raises(CorruptMetadata, match="tree node"):
        imported(bytes(image))


def test_an_array_that_ends_too_soon_is_refused() -> None:
    writer = KernelWriter()
    writer.cache_superblock([1 << 16 | 1], flags=0)
    image = bytearray(writer.image())
    struct.pack_into("<I", image, 240, 2)  # cache blocks
    image[:BLOCK] = writer.seal(bytes(image[4:BLOCK]), "cache")
    with pytest.raises(CorruptMetadata, match="entries of the mappings"):
        imported(bytes(image))


def test_a_block_in_the_place_of_another_is_refused() -> None:
    image = bytearray(image_of("6.12-2-clean"))
    (root,) = struct.unpack_from("<Q", image, 192)
    other = next(
        at
        for at in range(1, len(image) // BLOCK)
        if at != root and image[at * BLOCK + 4 : at * BLOCK + 8] == b"\2\0\0\0"
    )
    image[root * BLOCK : (root + 1) * BLOCK] = image[
        other * BLOCK : (other + 1) * BLOCK
    ]
    with pytest.raises(CorruptMetadata, match="own number of the mappings"):
        imported(bytes(image))
