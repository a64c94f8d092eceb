# SPDX-License-Identifier: Apache-2.0
"""A cache's dump shows all that its metadata says, and reads back; what cannot be is refused."""

from array import array

import pytest
from bitarray import bitarray

from nbdtarget_metadata.errors import BadDump
from nbdtarget_metadata.tools.cache_dump import render_cache
from nbdtarget_metadata.tools.kinds import parse_dump
from tests.support.metadata.cache_contents import lives
from tests.support.metadata.cache_dumps import (
    CONTENTS,
    PLAIN,
    make_cache,
    parsed,
    text_of,
    value,
)

AGES = sorted(lives())


SMALL_TEXT = """\
{
  "format": "nbdtarget metadata dump",
  "version": 1,
  "kind": "cache",
  "uuid": "000102030405060708090a0b0c0d0e0f",
  "generation": 7,
  "flags": ["clean_shutdown"],
  "compat": 0,
  "ro_compat": 0,
  "nr_commits": 6,
  "nr_compactions": 1,
  "dirty_log": false,
  "block_size_bytes": 65536,
  "origin_size_bytes": 6554112,
  "nr_cblocks": 4,
  "nr_mapped": 3,
  "nr_dirty": 1,
  "read_hits": 1,
  "read_misses": 2,
  "write_hits": 3,
  "write_misses": 4,
  "policy": "smq",
  "policy_version": [2, 0, 0],
  "discard_block_size_bytes": 131072,
  "nr_discard_blocks": 4,
  "discarded": [
    [1, 2]
  ],
  "mappings": [
    [0, 17, "clean", 5],
    [2, 99, "dirty", 0],
    [3, 3, "clean", 4294967295]
  ]
}
"""


def test_dump_to_the_blank() -> None:
    assert text_of(make_cache()) == SMALL_TEXT


@pytest.mark.parametrize("piece", [1, 7, 4096, 1 << 20])
@pytest.mark.parametrize("name", CONTENTS)
def test_dump_reads_back(name: str, piece: int) -> None:
    assert parsed(text_of(CONTENTS[name]), piece) == CONTENTS[name]


@pytest.mark.parametrize("age", AGES)
def test_dump_of_any_age_reads_back(age: str) -> None:
    content = lives()[age].content
    assert parsed(text_of(content)) == content


def test_many_mappings_come_in_pieces() -> None:
    nr = 20_000
    content = PLAIN._replace(
        values=array("Q", (value(2 * each) for each in range(nr))),
        dirty=bitarray("01" * (nr // 2), "little"),
        origin_size=2 * nr * 65536,
    )
    pieces = list(render_cache(content))
    assert max(map(len, pieces)) < sum(map(len, pieces)) // 3
    assert parsed("".join(pieces), 5000) == content


def changed(old: str, new: str) -> str:
    assert SMALL_TEXT.count(old) == 1
    return SMALL_TEXT.replace(old, new)


BAD = [
    ('[3, 3, "clean"', '[3, 17, "clean"', 29, "cache blocks 0 and 3 both hold origin"),
    ('[3, 3, "clean"', '[2, 3, "clean"', 32, "cache block 2 is out of order"),
    ('[3, 3, "clean"', '[4, 3, "clean"', 32, "cache block 4 is behind the last of 4"),
    ('[3, 3, "clean"', '[3, 100, "clean"', 29, "origin block 100 is behind the last"),
    ('[3, 3, "clean"', '[3, -1, "clean"', 32, "origin block -1 is out of range"),
    ('[3, 3, "clean"', '[3, 3, "muddy"', 32, "unknown state 'muddy'"),
    ('[3, 3, "clean"', '["3", 3, "clean"', 32, "expected a cache and an origin block"),
    (", 4294967295]", ", 4294967296]", 32, "expected a number of 0 to 4294967295"),
    (", 4294967295]", ', "x"]', 32, "expected a hint"),
    (", 4294967295]", "]", 29, "some mappings have no hint"),
    (", 4294967295]", ", 1, 2]", 32, "expected 3 or 4 things"),
    ("4294967295", "[]", 32, "expected [cache block, origin block, state]"),
    ('"nr_mapped": 3', '"nr_mapped": 2', 16, "expected 3 (as the other fields say)"),
    ('"nr_dirty": 1', '"nr_dirty": 2', 17, "expected 1 (as the other fields say)"),
    (
        '"nr_dirty": 1',
        '"nr_lost": "x", "nr_dirty": 1',
        17,
        "nr_lost: expected a number",
    ),
    ("65536,", "65537,", 13, "Invalid data block size"),
    ("6554112", str(1 << 63 << 1), 14, "expected a number"),
    ('"dirty_log": false', '"dirty_log": 0', 12, "expected true or false"),
    ('"dirty_log": false', '"dirty_log": true', 29, "is dirty, but not logged"),
    ('["clean_shutdown"]', "[]", 29, "cache block 0 counts as dirty"),
    ('"smq"', '""', 22, "expected a name of at most 16 bytes"),
    ("[2, 0, 0]", "[2, 0]", 23, "expected three numbers"),
    ('  "policy": "smq",\n', "", 22, "policy and policy_version stand together"),
    ('"nr_discard_blocks": 4', '"nr_discard_blocks": 2', 26, "behind the last of 2"),
    ('  "nr_discard_blocks": 4,\n', "", 24, "stand together"),
    ("[1, 2]", "[1, 0]", 27, "run [1, 0] is out of range or order"),
    ('"read_hits"', '"read_hit"', 18, "unknown field 'read_hit'"),
    ('  "read_hits": 1,\n', "", 33, "read_hits is missing"),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), BAD)
def test_bad_dump_is_refused_with_its_line(
    old: str, new: str, line: int, words: str
) -> None:
    with pytest.raises(BadDump) as caught:
        parsed(changed(old, new))
    assert words in str(caught.value)
    assert caught.value.line == line


def test_hints_and_discards_are_a_clean_shutdowns() -> None:
    text = changed('["clean_shutdown"]', "[]").replace('"clean", 5', '"dirty", 5')
    text = text.replace('3, "clean"', '3, "dirty"').replace(
        '"nr_dirty": 1', '"nr_dirty": 3'
    )
    with pytest.raises(BadDump, match="policy: recorded by a clean_shutdown only"):
        parsed(text)


def test_hints_without_a_policy_are_refused() -> None:
    text = changed('  "policy": "smq",\n  "policy_version": [2, 0, 0],\n', "")
    with pytest.raises(BadDump, match="hints without a policy"):
        parsed(text)


def test_fields_may_stand_in_any_order() -> None:
    text = changed('  "nr_cblocks": 4,\n', "").replace(
        "\n  ]\n}\n", '\n  ],\n  "nr_cblocks": 4\n}\n'
    )
    assert parsed(text) == make_cache()
    with pytest.raises(BadDump, match="cache block 3 is behind the last of 3"):
        parsed(text.replace('"nr_cblocks": 4', '"nr_cblocks": 3'))


def test_logged_block_that_is_not_dirty_needs_a_clean_shutdown() -> None:
    text = text_of(CONTENTS["logged"])
    assert '[0, 17, "clean logged"]' in text
    with pytest.raises(BadDump, match="cache block 0 counts as dirty"):
        parsed(text.replace('["clean_shutdown"]', "[]"))


def test_origin_has_no_more_blocks_than_a_mapping_can_say() -> None:
    content = PLAIN._replace(block_size=32768, origin_size=1 << 63)
    assert parsed(text_of(content)) == content
    with pytest.raises(BadDump, match="origin_size_bytes: more than 281474976710656"):
        parsed(text_of(content._replace(origin_size=(1 << 63) + 32768)))


def test_number_of_a_cache_block_makes_no_room_before_it_is_believed() -> None:
    with pytest.raises(BadDump, match="behind the last of 4"):
        parsed(changed('[3, 3, "clean"', f'[{(1 << 31) - 1}, 3, "clean"'))


@pytest.mark.slow
def test_no_bytes_do_more_than_be_refused() -> None:
    data = SMALL_TEXT.encode()
    refusals = set()
    for at in range(0, len(data), 2):
        for byte in b'\0"[]{},:0\\\xff':
            piece = data[:at] + bytes([byte]) + data[at + 1 :]
            try:
                parse_dump([piece])
            except BadDump as error:
                refusals.add(str(error))
    assert not any("\n" in each for each in refusals)
    assert len(refusals) > 100
