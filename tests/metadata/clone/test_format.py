# SPDX-License-Identifier: Apache-2.0
"""Read every fixture of a clone by FORMAT.md alone, with none of our code: in sixty lines.

What it finds must be what the dump beside the image says, and what our code finds.
"""

import json
from itertools import groupby
from pathlib import Path

import pytest

from tests.support.metadata.clone_reader import FLAGS, Reader
from tests.support.places import FIXTURES

IMAGES = sorted(FIXTURES.glob("clone-*.img"))


def runs_of(regions: set[int]) -> list[list[int]]:
    grouped = groupby(enumerate(sorted(regions)), key=lambda pair: pair[1] - pair[0])
    runs = [[region for _, region in pairs] for _, pairs in grouped]
    return [[run[0], len(run)] for run in runs]


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_format_md_describes_the_image(path: Path) -> None:
    reader = Reader(path.read_bytes())
    fields = reader.superblock()
    regions = reader.hydrated(fields)
    assert len(regions) == fields[18]
    arena_begin, arena_end = (4 + (fields[10] + nr) * fields[9] for nr in (0, 1))
    assert arena_begin <= fields[11]
    assert fields[11] + fields[12] + fields[14] <= arena_end <= len(reader.image) / 4096
    assert json.loads(path.with_suffix(".json").read_text()) == {
        "format": "nbdtarget metadata dump",
        "version": 1,
        "kind": fields[0],
        "generation": fields[1],
        "uuid": fields[2].hex(),
        "flags": [name for bit, name in FLAGS.items() if fields[3] & bit],
        "compat": fields[4],
        "ro_compat": fields[5],
        "nr_commits": fields[7],
        "nr_compactions": fields[8],
        "region_size_bytes": fields[16],
        "target_size_bytes": fields[17],
        "nr_regions": -(-fields[17] // fields[16]),
        "nr_hydrated": len(regions),
        "hydrated": runs_of(regions),
    }


def test_every_state_worth_keeping_has_its_image() -> None:
    layouts = {}
    for path in IMAGES:
        fields = Reader(path.read_bytes()).superblock()
        arena_begin = 4 + fields[10] * fields[9]
        layouts[path.stem] = (fields[11] > arena_begin, fields[12] > 0, fields[14] > 0)
    assert layouts == {
        "clone-v1": (False, True, True),
        "clone-v1-torn": (False, False, True),
        "clone-v1-overtaken": (True, True, True),
    }
