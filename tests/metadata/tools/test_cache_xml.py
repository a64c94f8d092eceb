# SPDX-License-Identifier: Apache-2.0
"""The XML of the tools for the kernel's caches, out and in."""

import re
from array import array

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.superblock import NO_POLICY
from nbdtarget_metadata.errors import BadDump
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.tools.cache_xml import parse_xml, render_xml
from tests.support.metadata.cache_contents import lives
from tests.support.metadata.cache_dumps import make_cache, value

AGES = sorted(lives())
UUID = bytes(range(16))
ORIGIN_SIZE = 100 * 65536 + 512

SMALL = """\
<superblock uuid="" block_size="128" nr_cache_blocks="4" policy="smq" hint_width="4">
  <mappings>
    <mapping cache_block="0" origin_block="17" dirty="false"/>
    <mapping cache_block="2" origin_block="99" dirty="true"/>
    <mapping cache_block="3" origin_block="3" dirty="false"/>
  </mappings>
  <hints>
    <hint cache_block="0" data="BQAAAA=="/>
    <hint cache_block="2" data="AAAAAA=="/>
    <hint cache_block="3" data="/////w=="/>
  </hints>
</superblock>
"""


def parsed(text: str, *, piece: int = 1 << 16, clean: bool = True) -> CacheContent:
    data = text.encode()
    pieces = (data[at : at + piece] for at in range(0, len(data), piece))
    return parse_xml(pieces, origin_size=ORIGIN_SIZE, uuid=UUID, clean=clean)


def test_xml_to_the_blank() -> None:
    assert "".join(render_xml(make_cache())) == SMALL


@pytest.mark.parametrize("piece", [1, 9, 4096])
def test_xml_says_all_but_what_it_has_no_words_for(piece: int) -> None:
    expected = make_cache(
        generation=1,
        nr_commits=0,
        nr_compactions=0,
        discarded=None,
        read_hits=0,
        read_misses=0,
        write_hits=0,
        write_misses=0,
    )
    assert parsed(SMALL, piece=piece) == expected


def test_without_a_clean_shutdown_all_is_dirty_and_nothing_hinted() -> None:
    found = parsed(SMALL, clean=False)
    assert found.flags == 0
    assert found.dirty == bitarray("1011", "little")
    assert (found.hints, found.policy) == (None, NO_POLICY)


@pytest.mark.parametrize("age", AGES)
def test_xml_again_is_identical(age: str) -> None:
    content = lives()[age].content
    text = "".join(render_xml(content))
    again = parse_xml(
        [text.encode()], origin_size=content.origin_size, uuid=UUID, clean=True
    )
    assert "".join(render_xml(again)) == text
    assert again.flags == CLEAN_SHUTDOWN


def changed(old: str, new: str) -> str:
    assert SMALL.count(old) == 1
    return SMALL.replace(old, new)


BAD = [
    ('block_size="128"', 'block_size="100"', 1, "Invalid data block size"),
    ('block_size="128"', 'block_size="x"', 1, "expected a number, found 'x'"),
    ('block_size="128" ', "", 1, "block_size is missing"),
    ('nr_cache_blocks="4"', 'nr_cache_blocks="0"', 1, "out of range"),
    ('nr_cache_blocks="4"', 'nr_cache_blocks="3"', 5, "is behind the last of 3"),
    ('policy="smq"', f'policy="{"p" * 17}"', 1, "at most 16 bytes"),
    ('hint_width="4"', 'hint_width="8"', 1, "hint_width: expected 0 or 4, found 8"),
    ('origin_block="3"', 'origin_block="17"', 13, "both hold origin block 17"),
    ('origin_block="3"', 'origin_block="100"', 5, "the origin is too small"),
    ('mapping cache_block="3"', 'mapping cache_block="1"', 5, "is out of order"),
    ('dirty="true"', 'dirty="maybe"', 4, "expected true or false"),
    ("BQAAAA==", "BQ==", 8, "expected 4 bytes in base64"),
    ("BQAAAA==", "B!AAAA==", 8, "expected 4 bytes in base64"),
    ('hint cache_block="2"', 'hint cache_block="1"', 9, "is not mapped"),
    ('hint cache_block="2"', 'hint cache_block="0"', 9, "out of order"),
    ("  </hints>", "  <hint/></hints>", 11, "cache_block is missing"),
    ("  </hints>", "  </hints><hints/>", 11, "stands twice"),
    ("  </hints>", "  </hints><mappings/>", 11, "stands twice"),
    ("  </hints>", "  </hints>text", 11, "unexpected text 'text'"),
    ("  </hints>", "  </hint>", 11, "not XML: mismatched tag"),
    ("</superblock>\n", "", 12, "not XML: no element found"),
    ("<superblock ", '<!DOCTYPE x [<!ENTITY a "b">]><superblock ', 1, "document type"),
    ("  </mappings>", "  <odd/></mappings>", 6, "unexpected element 'odd'"),
]


@pytest.mark.parametrize(("old", "new", "line", "words"), BAD)
def test_bad_xml_is_refused_with_its_line(
    old: str, new: str, line: int, words: str
) -> None:
    with pytest.raises(BadDump) as caught:
        parsed(changed(old, new))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)
    assert caught.value.line == line


@pytest.mark.parametrize("text", ["<superblock/>", "<mappings/>", "<a><b/></a>", "<"])
def test_other_xml_is_refused(text: str) -> None:
    with pytest.raises(BadDump):
        parsed(text)


def test_mappings_behind_hints_are_refused() -> None:
    hints = '<hints/><mappings><mapping cache_block="0" origin_block="1" dirty="true"/>'
    head = SMALL.split("\n")[0]
    with pytest.raises(BadDump, match="mappings stand before hints"):
        parsed(head + hints + "</mappings></superblock>")


def test_a_policy_without_hints_has_hint_width_zero() -> None:
    hints = SMALL[SMALL.index("  <hints>") :]
    found = parsed(
        changed('hint_width="4"', 'hint_width="0"').replace(hints, "</superblock>")
    )
    assert found.nr_mapped == 3
    assert (found.hints, found.policy) == (None, NO_POLICY)


def test_hints_of_no_bytes_are_none() -> None:
    text = changed('hint_width="4"', 'hint_width="0"')
    text = re.sub('data="[^"]*"', 'data=""', text)
    assert parsed(text).hints is None


def test_superblock_alone_is_refused() -> None:
    with pytest.raises(BadDump, match="mappings are missing"):
        parsed(SMALL.split("\n")[0] + "</superblock>")


def test_many_mappings_come_in_pieces() -> None:
    nr = 10_000
    content = make_cache(
        values=array("Q", (value(each) for each in range(nr))),
        dirty=zeros(nr, "little"),
        hints=array("I", range(nr)),
        origin_size=nr * 65536,
    )
    pieces = list(render_xml(content))
    assert max(map(len, pieces)) < sum(map(len, pieces)) // 3
    data = "".join(pieces).encode()
    again = parse_xml([data], origin_size=content.origin_size, uuid=UUID, clean=True)
    assert (again.values, again.hints) == (content.values, content.hints)
