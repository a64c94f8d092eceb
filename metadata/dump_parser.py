# SPDX-License-Identifier: Apache-2.0
"""Read a dump back. Any layout of the JSON will do, and any order of its fields.

In pieces: a dump may have a thousand million runs, and only their bits are kept. What is wrong is
told with its line. The dump has been in people's hands, so nothing in it is believed: each
field's range is checked, an unknown one is refused (it may be a known one, misspelt), and the
numbers that follow from others must agree with them.
"""

import re
from collections.abc import Iterable, Iterator
from typing import Any, Final

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from metadata.arena import NR_REGIONS_MAX, STEP_REGIONS
from metadata.content import CloneContent
from metadata.dump import DUMP_FORMAT, DUMP_VERSION, FLAG_NAMES
from metadata.envelope import DIGEST_SIZE
from metadata.errors import BadDump
from metadata.sizing import nr_regions_of, region_size_fault
from metadata.superblock import COUNTER_MAX

__all__ = ["parse"]

SECTOR_SIZE: Final = 512
# No key, number or list of flags is longer.
TOKEN_MAX: Final = 4096
BITS_MAX: Final = (1 << 64) - 1
FLAG_BITS: Final = 64

_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_TEXT: Final = re.compile(rb'"(?:[^"\\]|\\.)*"')
_VALUE: Final = re.compile(rb'(?:[^"\[\]{},]|"(?:[^"\\]|\\.)*"|\[[^\[\]{}]*\])*')
_RUN: Final = re.compile(rb"[ \t\r\n]*\[[^\]]*\][ \t\r\n]*,?")
_END_OF_RUNS: Final = re.compile(rb"\][ \t\r\n]*\]")

_ANY: Final = msgspec.json.Decoder()
_RUNS: Final = msgspec.json.Decoder(list[tuple[int, int]])

# The fields that are numbers, and their ranges.
_NUMBERS: Final = {
    "generation": (1, COUNTER_MAX),
    "compat": (0, BITS_MAX),
    "ro_compat": (0, BITS_MAX),
    "nr_commits": (0, COUNTER_MAX),
    "nr_compactions": (0, COUNTER_MAX),
    "region_size_bytes": (1, BITS_MAX),
    "target_size_bytes": (1, BITS_MAX),
    "nr_regions": (1, NR_REGIONS_MAX),
    "nr_hydrated": (0, NR_REGIONS_MAX),
}
_REQUIRED: Final = ("format", "version", "kind", "uuid", "flags", *_NUMBERS, "hydrated")


def parse(pieces: Iterable[bytes]) -> CloneContent:
    """Return the content that a dump, in pieces of any size, describes.

    Raises: BadDump.
    """
    return _Parser(pieces).parse()


class _Scanner:
    """The text, of which `TOKEN_MAX` bytes can be seen at a time, and the line we are in."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces: Iterator[bytes] = iter(pieces)
        self._is_ended = False
        self.text = b""
        self.at = 0
        self.line = 1

    def fill(self, wanted: int = TOKEN_MAX) -> None:
        """See to it that `wanted` bytes are in `text` behind `at`, if there are so many."""
        if self._is_ended or len(self.text) - self.at >= wanted:
            return
        parts = [self.text[self.at :]]
        length = len(parts[0])
        self.at = 0
        while length < wanted and not self._is_ended:
            piece = next(self._pieces, b"")
            self._is_ended = not piece
            parts.append(piece)
            length += len(piece)
        self.text = b"".join(parts)

    def advance(self, to: int) -> bytes:
        """Take what stands before `to`."""
        taken = self.text[self.at : to]
        self.line += taken.count(b"\n")
        self.at = to
        return taken

    def peek(self) -> bytes:
        """Return the next byte that is not blank; empty at the end."""
        while True:
            self.fill()
            match = _SPACE.match(self.text, self.at)
            assert match is not None
            self.advance(match.end())
            if self.at < len(self.text) or self._is_ended:
                return self.text[self.at : self.at + 1]

    def expect(self, *wanted: bytes) -> bytes:
        """Take one of the characters `wanted`."""
        found = self.peek()
        if found not in wanted or not found:
            words = " or ".join(repr(each.decode()) for each in wanted)
            raise self.error(f"expected {words}, found {self.shown()}")
        self.advance(self.at + 1)
        return found

    def take(self, pattern: re.Pattern[bytes], what: str) -> Any:
        """Take and decode a small value."""
        self.peek()
        match = pattern.match(self.text, self.at)
        if match is None:
            raise self.error(f"expected {what}, found {self.shown()}")
        try:
            value = _ANY.decode(match[0])
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            raise self.error(f"expected {what}, found {self.shown()}") from None
        self.advance(match.end())
        return value

    def shown(self) -> str:
        """Quote a little of what comes."""
        following = self.text[self.at : self.at + 20].split(b"\n")[0]
        return repr(following.decode("utf-8", "replace")) if following else "the end"

    def error(self, reason: str) -> BadDump:
        return BadDump(self.line, reason)


class _Parser:
    """One dump."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._scanner = _Scanner(pieces)
        self._fields: dict[str, Any] = {}
        self._lines: dict[str, int] = {}
        self._hydrated = bitarray(endian="little")

    def parse(self) -> CloneContent:
        scanner = self._scanner
        scanner.expect(b"{")
        while True:
            key = scanner.take(_TEXT, "the name of a field")
            scanner.expect(b":")
            if key in self._lines:
                raise scanner.error(f"{key} stands twice")
            scanner.peek()
            self._lines[key] = scanner.line
            if key == "hydrated":
                self._read_runs()
            else:
                self._fields[key] = self._checked(
                    key, scanner.take(_VALUE, f"{key}: a value")
                )
            if scanner.expect(b",", b"}") == b"}":
                break
        for key in _REQUIRED:
            if key not in self._lines:
                raise scanner.error(f"{key} is missing")
        if scanner.peek():
            raise scanner.error(f"expected the end, found {scanner.shown()}")
        return self._content()

    def _checked(self, key: str, value: Any) -> Any:
        """Return `value` as it is kept."""
        error = self._scanner.error
        if key in _NUMBERS:
            return self._number(key, value, *_NUMBERS[key])
        match key:
            case "format" if value != DUMP_FORMAT:
                raise error(f"format: expected {DUMP_FORMAT!r}, found {value!r}")
            case "version" if value != DUMP_VERSION or isinstance(value, bool):
                raise error(f"version {value!r} of the dump is not supported")
            case "kind" if value != "clone":
                raise error(f"kind: metadata of a {value!r} is not supported")
            case "uuid":
                return self._uuid(value)
            case "flags":
                return self._flags(value)
            case "nr_lost":
                return (
                    None
                    if value is None
                    else self._number(key, value, 1, NR_REGIONS_MAX)
                )
            case "format" | "version" | "kind":
                return value
        raise error(f"unknown field {key!r}")

    def _number(self, key: str, value: Any, least: int, most: int) -> int:
        is_number = isinstance(value, int) and not isinstance(value, bool)
        if is_number and least <= value <= most:
            number: int = value
            return number
        raise self._scanner.error(
            f"{key}: expected a number of {least} to {most}, found {value!r}"
        )

    def _uuid(self, value: Any) -> bytes:
        digits = 2 * DIGEST_SIZE
        if isinstance(value, str) and re.fullmatch(f"[0-9a-f]{{{digits}}}", value):
            return bytes.fromhex(value)
        raise self._scanner.error(
            f"uuid: expected {digits} hexadecimal digits, found {value!r}"
        )

    def _flags(self, value: Any) -> int:
        bits = {name: bit for bit, name in FLAG_NAMES.items()}
        for nr in range(FLAG_BITS):
            if 1 << nr not in FLAG_NAMES:
                bits[f"bit {nr}"] = 1 << nr
        flags = 0
        if not isinstance(value, list):
            raise self._scanner.error(f"flags: expected a list, found {value!r}")
        for name in value:
            if not isinstance(name, str) or name not in bits:
                raise self._scanner.error(f"flags: unknown flag {name!r}")
            flags |= bits[name]
        return flags

    # Runs

    def _read_runs(self) -> None:
        scanner = self._scanner
        scanner.expect(b"[")
        if scanner.peek() == b"]":
            scanner.expect(b"]")
            return
        while True:
            scanner.peek()
            text = scanner.text
            end = _END_OF_RUNS.search(text, scanner.at)
            # All runs that can be seen whole: up to the end, or up to the last bracket.
            stop = end.start() + 1 if end else text.rfind(b"]", scanner.at) + 1
            if stop <= scanner.at:
                raise scanner.error(
                    f"hydrated: expected a run, found {scanner.shown()}"
                )
            self._set_runs(scanner.text[scanner.at : stop])
            scanner.advance(stop)
            if scanner.expect(b",", b"]") == b"]":
                return

    def _set_runs(self, text: bytes) -> None:
        try:
            runs = _RUNS.decode(b"[" + text + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._first_bad(text) from None
        hydrated = self._hydrated
        for nr, (begin, count) in enumerate(runs):
            end = begin + count
            if begin < len(hydrated) or count < 1 or end > NR_REGIONS_MAX:
                raise BadDump(
                    self._line_of_run(text, nr),
                    f"hydrated: run [{begin}, {count}] is out of range or order",
                )
            while len(hydrated) < begin:
                hydrated.extend(
                    zeros(min(STEP_REGIONS, begin - len(hydrated)), "little")
                )
            while len(hydrated) < end:
                first = len(hydrated)
                hydrated.extend(zeros(min(STEP_REGIONS, end - first), "little"))
                hydrated[first:] = True

    def _line_of_run(self, text: bytes, nr: int) -> int:
        at = 0
        for _ in range(nr):
            match = _RUN.match(text, at)
            assert match is not None
            at = match.end()
        at = text.index(b"[", at)
        return self._scanner.line + text.count(b"\n", 0, at)

    def _first_bad(self, text: bytes) -> BadDump:
        """Find the run that cannot be decoded."""
        at = 0
        while match := _RUN.match(text, at):
            run = match[0].strip().removesuffix(b",")
            is_last = match.end() == len(text)
            has_comma = match[0].endswith(b",")
            try:
                _RUNS.decode(b"[" + run + b"]")
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            if has_comma == is_last:
                break
            at = match.end()
        begin = at + len(text[at:]) - len(text[at:].lstrip())
        found = text[begin : begin + 40].split(b"\n")[0].decode("utf-8", "replace")
        return BadDump(
            self._scanner.line + text.count(b"\n", 0, begin),
            f"hydrated: expected [first region, number of regions], found {found!r}",
        )

    # What follows from what

    def _content(self) -> CloneContent:
        fields, lines = self._fields, self._lines
        region_size = fields["region_size_bytes"]
        target_size = fields["target_size_bytes"]
        fault = region_size_fault(region_size)
        if fault:
            raise BadDump(lines["region_size_bytes"], f"region_size_bytes: {fault}")
        if target_size % SECTOR_SIZE:
            raise BadDump(
                lines["target_size_bytes"],
                f"target_size_bytes: {target_size} is not a multiple of {SECTOR_SIZE}",
            )
        nr_regions = nr_regions_of(target_size, region_size)
        self._expect("nr_regions", nr_regions)
        hydrated = self._hydrated
        if len(hydrated) > nr_regions:
            raise BadDump(
                lines["hydrated"],
                f"hydrated: region {len(hydrated) - 1} is behind the last of {nr_regions}",
            )
        while len(hydrated) < nr_regions:
            hydrated.extend(
                zeros(min(STEP_REGIONS, nr_regions - len(hydrated)), "little")
            )
        self._expect("nr_hydrated", hydrated.count())
        return CloneContent(
            uuid=fields["uuid"],
            generation=fields["generation"],
            flags=fields["flags"],
            compat=fields["compat"],
            ro_compat=fields["ro_compat"],
            nr_commits=fields["nr_commits"],
            nr_compactions=fields["nr_compactions"],
            region_size=region_size,
            target_size=target_size,
            hydrated=hydrated,
            nr_lost=fields.get("nr_lost", 0),
        )

    def _expect(self, key: str, expected: int) -> None:
        found = self._fields[key]
        if found != expected:
            raise BadDump(
                self._lines[key],
                f"{key}: expected {expected} (as the other fields say), found {found}",
            )
