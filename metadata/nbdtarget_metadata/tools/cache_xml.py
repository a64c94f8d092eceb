# SPDX-License-Identifier: Apache-2.0
"""The XML that the tools for the kernel's caches read and write, out and in.

    <superblock uuid="" block_size="128" nr_cache_blocks="1000" policy="smq" hint_width="4">
      <mappings>
        <mapping cache_block="0" origin_block="17" dirty="false"/>
      </mappings>
      <hints>
        <hint cache_block="0" data="AwAAAA=="/>
      </hints>
    </superblock>

`block_size` is in 512-byte sectors, a hint is base64 of its little-endian bytes. The origin's size, the
uuid, the statistics, the discards, and what is logged in advance are not in it. So the caller must give the
origin's size; the uuid is new; the others start empty.

Its dirty bits are as good as the tool that wrote them. For example cache_dump 0.9.0 does not look at the dirty
bits of format 2 and writes "false" for each block; and after an unclean shutdown the bits of a kernel are out of
date. XML does not say which tool wrote it, nor how the cache ended. So the dirty bits are believed only when the
user asks for that (`clean=True`); else each mapped block counts as dirty.

`hint_width` 0 is a policy without hints.
"""

import binascii
from base64 import b64decode, b64encode
from collections.abc import Callable, Iterable, Iterator
from typing import Final
from xml.parsers import expat
from xml.sax.saxutils import quoteattr

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.records import (
    NR_CBLOCKS_MAX,
    NR_OBLOCKS_MAX,
    OBLOCK_SHIFT,
)
from nbdtarget_metadata.cache.superblock import (
    HINT_SIZE,
    NO_POLICY,
    POLICY_NAME_MAX,
    PolicyIdentity,
)
from nbdtarget_metadata.errors import BadDump
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.tools.cache_dump_parser import MappingReader
from nbdtarget_metadata.tools.dump import LINES_PER_PIECE
from nbdtarget_metadata.units import BLOCK_SIZE_MIN, SECTOR, block_size_fault

__all__ = ["parse_xml", "render_xml"]

# The kernel's tools restore a policy's hints with this version.
POLICY_VERSION: Final = (2, 0, 0)
_NUMBER_DIGITS_MAX: Final = 20


def render_xml(content: CacheContent) -> Iterator[str]:
    """Yield the text in pieces. XML cannot say that blocks are lost or doubtful: refuse such content first.

    Mappings that the next start would give up are left out: nothing in the text could say so.
    """
    yield (
        f'<superblock uuid="" block_size="{content.block_size // SECTOR}"'
        f' nr_cache_blocks="{content.nr_cblocks}"'
        f' policy={quoteattr(content.policy.name)} hint_width="{HINT_SIZE}">\n'
        "  <mappings>\n"
    )
    yield from _pieces(_mappings(content))
    yield "  </mappings>\n  <hints>\n"
    yield from _pieces(_hints(content))
    yield "  </hints>\n</superblock>\n"


def _mappings(content: CacheContent) -> Iterator[str]:
    dirty = content.dirty
    if content.gives_up_mappings:
        return
    for cblock, value in enumerate(content.values):
        if value:
            yield (
                f'    <mapping cache_block="{cblock}"'
                f' origin_block="{value >> OBLOCK_SHIFT}"'
                f' dirty="{"true" if dirty[cblock] else "false"}"/>\n'
            )


def _hints(content: CacheContent) -> Iterator[str]:
    hints = content.hints
    if hints is None:
        return
    for cblock, value in enumerate(content.values):
        if value:
            data = b64encode(hints[cblock].to_bytes(HINT_SIZE, "little")).decode()
            yield f'    <hint cache_block="{cblock}" data="{data}"/>\n'


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    kept: list[str] = []
    for line in lines:
        kept.append(line)
        if len(kept) == LINES_PER_PIECE:
            yield "".join(kept)
            kept.clear()
    yield "".join(kept)


def parse_xml(
    pieces: Iterable[bytes], *, origin_size: int, uuid: bytes, clean: bool = False
) -> CacheContent:
    """Return the content that an XML dump, in pieces of any size, describes.

    Args:
        origin_size: bytes. uuid: of the metadata to be.
        clean: believe dirty bits and hints; else each mapped block counts as dirty.

    Raises: BadDump.
    """
    assert 0 < origin_size // BLOCK_SIZE_MIN + 1 <= NR_OBLOCKS_MAX
    reader = _Reader(origin_size)
    reader.read(pieces)
    return reader.content(uuid, clean=clean)


class _Reader:
    """One XML dump. It is given the elements one by one, and keeps none of them."""

    def __init__(self, origin_size: int) -> None:
        self._origin_size = origin_size
        self._block_size = 0
        self._nr_cblocks = NR_CBLOCKS_MAX
        self._policy = NO_POLICY
        self._hint_width = HINT_SIZE
        self._mappings = MappingReader(lambda: self._nr_cblocks)
        self._path: list[str] = []
        self._seen: set[str] = set()
        self._hint_min = 0
        self._parser = parser = expat.ParserCreate()
        parser.StartElementHandler = self._start
        parser.EndElementHandler = self._end
        parser.CharacterDataHandler = self._text
        # No entities: a few lines of them can be made to mean gigabytes.
        parser.StartDoctypeDeclHandler = self._doctype
        self._elements: dict[str, Callable[[dict[str, str]], None]] = {
            "superblock": self._superblock,
            "superblock/mappings": self._list,
            "superblock/hints": self._list,
            "superblock/mappings/mapping": self._mapping,
            "superblock/hints/hint": self._hint,
        }

    def read(self, pieces: Iterable[bytes]) -> None:
        """Raises: BadDump."""
        parser = self._parser
        try:
            for piece in pieces:
                parser.Parse(piece, False)
            parser.Parse(b"", True)
        except expat.ExpatError as error:
            reason = expat.errors.messages[error.code]
            raise BadDump(error.lineno, f"not XML: {reason}") from None
        if "superblock/mappings" not in self._seen:
            raise self._bad("mappings are missing")

    def content(self, uuid: bytes, *, clean: bool) -> CacheContent:
        """Return what was read. Raises: BadDump."""
        mappings = self._mappings
        twice = mappings.maybe_twice()
        if twice is not None:
            oblock, first, second = twice
            raise self._bad(
                f"cache blocks {first} and {second} both hold origin block {oblock}"
            )
        mappings.fill(self._nr_cblocks)
        has_hints = clean and bool(mappings.nr_hints) and bool(self._policy.name)
        dirty = mappings.dirty
        if not clean:
            for cblock, value in enumerate(mappings.values):
                dirty[cblock] = bool(value)
        return CacheContent(
            uuid=uuid,
            generation=1,
            flags=CLEAN_SHUTDOWN if clean else 0,
            compat=0,
            ro_compat=0,
            incompat=0,
            nr_commits=0,
            nr_compactions=0,
            block_size=self._block_size,
            origin_size=self._origin_size,
            values=mappings.values,
            dirty=dirty,
            policy=self._policy if has_hints else NO_POLICY,
            hints=mappings.hints if has_hints else None,
            discarded=None,
            read_hits=0,
            read_misses=0,
            write_hits=0,
            write_misses=0,
        )

    # ---- what the parser calls ----

    def _start(self, name: str, attributes: dict[str, str]) -> None:
        self._path.append(name)
        path = "/".join(self._path)
        if path not in self._elements:
            raise self._bad(f"unexpected element {name!r}")
        try:
            self._elements[path](attributes)
        except KeyError as missing:
            raise self._bad(f"{name}: {missing.args[0]} is missing") from None
        except ValueError as error:
            raise self._bad(f"{name}: {error}") from None
        self._seen.add(path)

    def _end(self, name: str) -> None:
        self._path.pop()

    def _text(self, text: str) -> None:
        if text.strip():
            raise self._bad(f"unexpected text {text.strip()[:20]!r}")

    def _doctype(self, *args: object) -> None:
        raise self._bad("a document type has no place here")

    def _superblock(self, attributes: dict[str, str]) -> None:
        sectors = _number(attributes["block_size"])
        fault = block_size_fault(sectors * SECTOR)
        if fault:
            raise ValueError(f"block_size {sectors}: {fault}")
        self._block_size = sectors * SECTOR
        self._nr_cblocks = _number(attributes["nr_cache_blocks"])
        if not 0 < self._nr_cblocks <= NR_CBLOCKS_MAX:
            raise ValueError(f"nr_cache_blocks {self._nr_cblocks} is out of range")
        name = attributes["policy"]
        if len(name.encode()) > POLICY_NAME_MAX:
            raise ValueError(f"policy: a name has at most {POLICY_NAME_MAX} bytes")
        width = _number(attributes["hint_width"])
        if width not in (0, HINT_SIZE):
            raise ValueError(f"hint_width: expected 0 or {HINT_SIZE}, found {width}")
        self._hint_width = width
        self._policy = PolicyIdentity(name, POLICY_VERSION)

    def _list(self, attributes: dict[str, str]) -> None:
        if "/".join(self._path) in self._seen:
            raise ValueError("stands twice")

    def _mapping(self, attributes: dict[str, str]) -> None:
        if "superblock/hints" in self._seen:
            raise ValueError("mappings stand before hints")
        dirty = attributes["dirty"]
        if dirty not in ("true", "false"):
            raise ValueError(f"dirty: expected true or false, found {dirty!r}")
        oblock = _number(attributes["origin_block"])
        nr_oblocks = self._origin_size // self._block_size
        if oblock >= nr_oblocks:
            raise ValueError(
                f"origin block {oblock} is behind the last whole one of {nr_oblocks}:"
                " the origin is too small"
            )
        cblock = _number(attributes["cache_block"])
        self._mappings.add(cblock, oblock, dirty=dirty == "true")

    def _hint(self, attributes: dict[str, str]) -> None:
        cblock = _number(attributes["cache_block"])
        values, hints = self._mappings.values, self._mappings.hints
        if not self._hint_min <= cblock < len(values) or not values[cblock]:
            raise ValueError(f"cache block {cblock} is not mapped, or out of order")
        try:
            data = b64decode(attributes["data"], validate=True)
        except binascii.Error:
            data = b""
        if len(data) != self._hint_width:
            raise ValueError(f"data: expected {self._hint_width} bytes in base64")
        if not data:
            return
        hints[cblock] = int.from_bytes(data, "little")
        self._mappings.nr_hints += 1
        self._hint_min = cblock + 1

    def _bad(self, reason: str) -> BadDump:
        return BadDump(self._parser.CurrentLineNumber, reason)


def _number(text: str) -> int:
    if text.isascii() and text.isdecimal() and len(text) <= _NUMBER_DIGITS_MAX:
        return int(text)
    raise ValueError(f"expected a number, found {text[:20]!r}")
