# SPDX-License-Identifier: Apache-2.0
"""The fixtures of a cache, read by FORMAT.md alone; and a crash while it is formatted."""

import json
import random
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest

from nbdtarget_metadata.cache.content import read_cache_content
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import NotFormatted
from nbdtarget_metadata.tools.cache_dump import render_cache
from tests.support.metadata.cache_images import held_by, open_cache
from tests.support.metadata.cache_reader import Held, held_in, live_ranges
from tests.support.metadata.clone_reader import FLAGS, Reader
from tests.support.metadata.small_cache import (
    BLOCK_SIZE,
    NR_CBLOCKS,
    ORIGIN_SIZE,
    SIZE,
    UUID,
    commit,
    format_on,
    open_on,
    start,
)
from tests.support.metadata.store import Store, cut, drive, read_image
from tests.support.places import FIXTURES

IMAGES = sorted(FIXTURES.glob("cache-*.img"))


class CacheReader(Reader):
    """Reads the records that a cache's superblock vouches for, and checks their rules."""

    fixed = (2, 9, 16, 19)

    def check_chains(self, fields: list[Any]) -> None:
        snapshot, journal, sync = live_ranges(fields)
        self._check_chain(snapshot, fields[2], fields[13], fields[1])
        self._check_chain(journal, fields[13], fields[15], fields[1])
        self._check_chain(sync, fields[2], fields[25], fields[1])

    def _check_chain(
        self, blocks: range, link: bytes, last: bytes, generation_max: int
    ) -> None:
        block, generation = blocks.start, 0
        while block < blocks.stop:
            opened = self.envelope(b"nbdt-rec", block)
            assert opened
            record, digest, end = opened
            assert record[2] == link
            assert generation <= record[1] <= generation_max
            assert end - block <= 128
            link, generation, block = digest, record[1], end
        assert (block, link) == (blocks.stop, last)


def dump_of(fields: list[Any], held: Held) -> dict[str, Any]:
    is_clean = bool(fields[3] & 1)
    dump = {
        "format": "nbdtarget metadata dump",
        "version": 1,
        "kind": fields[0],
        "uuid": fields[2].hex(),
        "generation": fields[1],
        "flags": [name for bit, name in FLAGS.items() if fields[3] & bit],
        "compat": fields[4],
        "ro_compat": fields[5],
        "nr_commits": fields[7],
        "nr_compactions": fields[8],
        "dirty_log": bool(fields[6] & 1),
        "block_size_bytes": fields[16],
        "origin_size_bytes": fields[17],
        "nr_cblocks": fields[18],
        "nr_mapped": fields[20],
        "nr_dirty": fields[22] if is_clean else len(held.dirty),
        "read_hits": fields[31],
        "read_misses": fields[32],
        "write_hits": fields[33],
        "write_misses": fields[34],
    }
    if is_clean and fields[26]:
        dump |= {"policy": fields[26], "policy_version": fields[27]}
    if held.discards is not None:
        dump["discard_block_size_bytes"] = fields[29]
        dump["nr_discard_blocks"] = fields[30]
        runs = groupby(enumerate(held.discards), key=lambda pair: pair[1])
        both = [(bit, [at for at, _ in run]) for bit, run in runs]
        dump["discarded"] = [[run[0], len(run)] for bit, run in both if bit == "1"]
    dump["mappings"] = [mapping(at, held) for at in sorted(held.values)]
    return dump


def mapping(cblock: int, held: Held) -> list[Any]:
    value = held.values[cblock]
    state = "dirty" if cblock in held.dirty else "clean"
    row = [cblock, value >> 16, state + (" logged" if value & 2 else "")]
    return row if held.hints is None else [*row, held.hints[cblock]]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_format_md_describes_the_image(path: Path) -> None:
    image = path.read_bytes()
    reader = CacheReader(image)
    fields = reader.superblock()
    reader.check_chains(fields)
    held = held_in(image, fields)
    assert fields[20] == len(held.values)
    assert fields[21] == sum(value >> 1 & 1 for value in held.values.values())
    assert dump_of(fields, held) == json.loads(path.with_suffix(".json").read_text())


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_image_opens_for_ever_and_can_be_used(path: Path) -> None:
    store = Store(path.stat().st_size, path.read_bytes())
    held = held_in(bytes(store.durable), CacheReader(bytes(store.durable)).superblock())
    metadata = open_cache(bytes(store.durable))
    assert held_by(metadata) == held
    kept = set(held.values)
    if metadata.gives_up_mappings:
        drive(store, metadata.drop_clean())
        kept = set()
    start(store, metadata, dirty_log=True)
    while metadata.changed:
        commit(store, metadata)
    again = open_cache(bytes(store.durable))
    assert held_by(again).values.keys() == kept
    assert held_by(again).dirty >= held.dirty
    assert again.notes == ()


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_image_dumps_as_it_did(path: Path) -> None:
    image = path.read_bytes()
    content = read_image(image, read_cache_content(len(image)))
    assert "".join(render_cache(content)) == path.with_suffix(".json").read_text()


def test_every_state_worth_keeping_has_its_image() -> None:
    states = {}
    for path in IMAGES:
        fields = CacheReader(path.read_bytes()).superblock()
        snapshot, journal, sync = (bool(each) for each in live_ranges(fields))
        states[path.stem] = (fields[3], fields[6], snapshot, journal, sync)
    assert states == {
        "cache-v1": (1, 1, True, True, True),
        "cache-v1-torn": (0, 1, False, True, False),
        "cache-v1-overtaken": (0, 1, True, True, False),
        "cache-v1-complete": (4, 1, False, True, False),
    }


def format_crash_images() -> list[bytes]:
    """Return what a crash at any time while formatting may leave."""
    rng = random.Random(1)
    store = Store(SIZE)
    steps = CacheMetadata.format(
        device_size=SIZE,
        block_size=BLOCK_SIZE,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        uuid=UUID,
    )
    return list(cut(store, steps, rng))


def test_crash_while_formatting_leaves_it_formatted_or_formattable() -> None:
    opened = unformatted = 0
    for image in format_crash_images():
        try:
            metadata = open_on(Store(SIZE, image))
            opened += 1
        except NotFormatted:
            metadata = format_on(Store(SIZE, image))
            unformatted += 1
        assert (metadata.generation, metadata.nr_mapped) == (1, 0)
    assert opened > 0
    assert unformatted > 0
