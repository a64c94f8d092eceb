# SPDX-License-Identifier: Apache-2.0
"""A dump shows all that metadata says, and reads back from any JSON that means the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.content import read_clone_content
from nbdtarget_metadata.errors import BadDump
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, NEEDS_CHECK
from nbdtarget_metadata.tools import dump_fields
from nbdtarget_metadata.tools.clone_dump import render_clone
from nbdtarget_metadata.tools.clone_dump_parser import parse_clone
from nbdtarget_metadata.tools.dump import flag_names
from nbdtarget_metadata.tools.dump_fields import TOKEN_MAX, Scanner
from tests.support.metadata.clone_dumps import make_content, text_of
from tests.support.metadata.store import read_image
from tests.support.places import FIXTURES

IMAGES = sorted(FIXTURES.glob("clone-*.img"))


SMALL = make_content(bitarray("0110000111", "little"))
SMALL_TEXT = """\
{
  "format": "nbdtarget metadata dump",
  "version": 1,
  "kind": "clone",
  "uuid": "000102030405060708090a0b0c0d0e0f",
  "generation": 7,
  "flags": ["clean_shutdown"],
  "compat": 0,
  "ro_compat": 0,
  "nr_commits": 6,
  "nr_compactions": 1,
  "region_size_bytes": 4096,
  "target_size_bytes": 40448,
  "nr_regions": 10,
  "nr_hydrated": 5,
  "hydrated": [
    [1, 2],
    [7, 3]
  ]
}
"""


def test_dump_to_the_byte() -> None:
    assert text_of(SMALL) == SMALL_TEXT


@pytest.mark.parametrize("path", IMAGES, ids=lambda path: path.stem)
def test_every_fixture_dumps_as_it_did(path: Path) -> None:
    image = path.read_bytes()
    content = read_image(image, read_clone_content(len(image)))
    assert text_of(content) == path.with_suffix(".json").read_text()


@pytest.mark.parametrize("bits", ["0", "1", "11111", "00000", "10101", "0" * 5000])
def test_dump_reads_back(bits: str) -> None:
    content = make_content(bitarray(bits, "little"))
    assert parse_clone([text_of(content).encode()]) == content


def test_many_runs_go_through_in_pieces() -> None:
    content = make_content(bitarray("01" * 10_000, "little"))
    text = text_of(content).encode()
    assert json.loads(text)["hydrated"][9999] == [19_999, 1]
    for size in (1, 61, 4096, 65536):
        pieces = (text[at : at + size] for at in range(0, len(text), size))
        assert parse_clone(pieces) == content


def test_flags_are_names() -> None:
    assert flag_names(0) == []
    assert flag_names(CLEAN_SHUTDOWN | NEEDS_CHECK) == ["clean_shutdown", "needs_check"]
    unknown = make_content(zeros(9, "little"), flags=1 | 1 << 5)
    assert '"flags": ["clean_shutdown", "bit 5"]' in text_of(unknown)
    assert parse_clone([text_of(unknown).encode()]).flags == 1 | 1 << 5


@pytest.mark.parametrize("nr_lost", [3, None])
def test_loss_is_in_the_dump(nr_lost: int | None) -> None:
    content = SMALL._replace(nr_lost=nr_lost)
    assert f'"nr_lost": {json.dumps(nr_lost)},' in text_of(content)
    assert parse_clone([text_of(content).encode()]) == content


def layouts() -> list[str]:
    value = json.loads(SMALL_TEXT)
    return [
        json.dumps(value),
        json.dumps(value, separators=(",", ":")),
        json.dumps(value, sort_keys=True, indent=4),
        json.dumps(value, indent="\t").replace("\n", "\r\n"),
        json.dumps(dict(reversed(value.items())), indent=1),
        "\n\n " + SMALL_TEXT + "\n\n",
    ]


@pytest.mark.parametrize("piece", [1, 5, 10_000])
@pytest.mark.parametrize("text", layouts(), ids=range(len(layouts())))
def test_any_layout_of_the_json_will_do(text: str, piece: int) -> None:
    data = text.encode()
    assert (
        parse_clone(data[at : at + piece] for at in range(0, len(data), piece)) == SMALL
    )


BAD = {
    "empty": ("", 1, "expected '{', found the end"),
    "not an object": ("[]", 1, "expected '{'"),
    "cut in a name": (SMALL_TEXT[:8], 2, "the name of a field"),
    "cut in the runs": (SMALL_TEXT[:-16], 18, "hydrated"),
    "cut at the end": (SMALL_TEXT[:-2], 20, "expected ',' or '}', found the end"),
    "more behind it": (SMALL_TEXT + "{}", 21, "expected the end"),
    "not utf-8": (SMALL_TEXT.replace("uuid", "u\udc80"), 5, "the name of a field"),
}
CHANGES = {
    "format": ('"nbdtarget metadata dump"', '"thin dump"', 2, "format: expected"),
    "version": ('"version": 1', '"version": 2', 3, "version 2 of the dump"),
    "true version": ('"version": 1', '"version": true', 3, "version True"),
    "kind": ('"clone"', '"thin"', 4, "metadata of a 'thin' is not supported"),
    "uuid": ('"0001', '"0x01', 5, "uuid: expected 32 hexadecimal digits"),
    "uuid no text": ('"uuid": "', '"uuid": 5, "x": "', 5, "uuid: expected 32"),
    "generation": ('7,\n  "flags', '0,\n  "flags', 6, "generation: expected a number"),
    "float": ('_commits": 6', '_commits": 6.5', 10, "nr_commits: expected a number"),
    "bool": ('_commits": 6', '_commits": true', 10, "found True"),
    "text": ('_commits": 6', '_commits": "6"', 10, "found '6'"),
    "negative": ('_compactions": 1', '_compactions": -1', 11, "found -1"),
    "huge": ('_compactions": 1', '_compactions": 1' + 30 * "0", 11, "nr_compactions"),
    "flags": ('"clean_shutdown"', '"dirty"', 7, "unknown flag 'dirty'"),
    "flags no list": ('["clean_shutdown"]', '"clean_shutdown"', 7, "expected a list"),
    "no value": ('"compat": 0', '"compat": ', 8, "compat: a value"),
    "object": ('"compat": 0', '"compat": {}', 8, "compat: a value"),
    "region size": ('_bytes": 4096', '_bytes": 4097', 12, "not a power of 2"),
    "small region": ('_bytes": 4096', '_bytes": 512', 12, "Invalid region size"),
    "target size": ("40448", "40449", 13, "not a multiple of 512"),
    "nr_regions": ('_regions": 10', '_regions": 11', 14, "nr_regions: expected 10"),
    "nr_hydrated": ('_hydrated": 5', '_hydrated": 6', 15, "nr_hydrated: expected 5"),
    "behind the last": ("[7, 3]", "[7, 4]", 16, "region 10 is behind the last of 10"),
    "overlap": ("[7, 3]", "[2, 3]", 18, "run [2, 3] is out of range or order"),
    "empty run": ("[1, 2]", "[1, 0]", 17, "run [1, 0] is out of range"),
    "far run": ("[7, 3]", "[2147483647, 2]", 18, "out of range"),
    "negative run": ("[1, 2]", "[-1, 2]", 17, "out of range"),
    "run of three": ("[7, 3]", "[7, 3, 1]", 18, "found '[7, 3, 1]"),
    "run of text": ("[1, 2]", '["1", 2]', 17, "first region, number of regions"),
    "no comma": ("[1, 2],", "[1, 2]", 17, "hydrated"),
    "comma at the end": ("[7, 3]", "[7, 3],", 19, "hydrated"),
    "runs are none": ("[7, 3]", "7", 18, "hydrated"),
    "unknown": ('"compat": 0', '"compat": 0, "new": 1', 8, "unknown field 'new'"),
    "twice": ('"ro_compat": 0', '"compat": 0', 9, "compat stands twice"),
    "missing": ('  "ro_compat": 0,\n', "", 19, "ro_compat is missing"),
    "no colon": ('"compat": 0', '"compat" 0', 8, "expected ':', found '0,'"),
}
for name, (old, new, line, words) in CHANGES.items():
    assert SMALL_TEXT.count(old) == 1, name
    BAD[name] = (SMALL_TEXT.replace(old, new), line, words)


@pytest.mark.parametrize("piece", [3, 10_000])
@pytest.mark.parametrize(("text", "line", "words"), BAD.values(), ids=BAD.keys())
def test_bad_dump_is_told_with_its_line(
    text: str, line: int, words: str, piece: int
) -> None:
    data = text.encode("utf-8", "surrogateescape")
    with pytest.raises(BadDump) as caught:
        parse_clone(data[at : at + piece] for at in range(0, len(data), piece))
    assert (caught.value.line, words in caught.value.reason) == (line, True), str(
        caught.value
    )
    assert "\n" not in str(caught.value)


@pytest.mark.slow
def test_no_bytes_do_more_than_be_refused() -> None:
    data = SMALL_TEXT.encode()
    for at in range(len(data)):
        for byte in b'\0"[]{},:0\\\xff':
            changed = data[:at] + bytes([byte]) + data[at + 1 :]
            try:
                parse_clone([changed])
            except BadDump:
                continue


def test_neither_way_keeps_more_than_a_piece_and_the_bits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    content = make_content(bitarray("01" * 40_000, "little"))
    text = text_of(content).encode()
    assert max(map(len, render_clone(content))) < len(text) // 8

    def pieces() -> Iterator[bytes]:
        for at in range(0, len(text), 4096):
            assert all(len(each.text) <= 4096 + TOKEN_MAX for each in scanners)
            yield text[at : at + 4096]

    scanners: list[Scanner] = []

    def scanner(pieces: Iterator[bytes]) -> Scanner:
        scanners.append(Scanner(pieces))
        return scanners[-1]

    monkeypatch.setattr(dump_fields, "Scanner", scanner)
    assert parse_clone(pieces()) == content
    assert len(scanners) == 1
