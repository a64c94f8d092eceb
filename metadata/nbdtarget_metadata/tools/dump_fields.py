# SPDX-License-Identifier: Apache-2.0
"""Read the fields of a dump back. Any layout of the JSON will do, and any order of its fields.

In pieces: a dump may have a thousand million rows, and only their values are kept. A mistake is
reported with its line. People may have edited the dump, so nothing in it is believed: each
field's range is checked, an unknown one is refused (it may be a known one, misspelt).
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Final, NamedTuple

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.load import STEP_REGIONS
from nbdtarget_metadata.errors import BadDump
from nbdtarget_metadata.log.envelope import DIGEST_SIZE
from nbdtarget_metadata.tools.dump import DUMP_FORMAT, DUMP_VERSION, FLAG_NAMES

__all__ = ["BITS_MAX", "BadRow", "Fields", "Rows", "RunReader", "Scanner", "number"]

# No key, number or list of flags is longer.
TOKEN_MAX: Final = 4096
BITS_MAX: Final = (1 << 64) - 1
FLAG_BITS: Final = 64

_SPACE: Final = re.compile(rb"[ \t\r\n]*")
_TEXT: Final = re.compile(rb'"(?:[^"\\]|\\.)*"')
_VALUE: Final = re.compile(rb'(?:[^"\[\]{},]|"(?:[^"\\]|\\.)*"|\[[^\[\]{}]*\])*')
_ROW: Final = re.compile(rb"[ \t\r\n]*\[[^\]]*\][ \t\r\n]*,?")
_END_OF_ROWS: Final = re.compile(rb"\][ \t\r\n]*\]")

_ANY: Final = msgspec.json.Decoder()

# The fields that every kind has.
_NAMES: Final = ("format", "version", "kind", "uuid", "flags")


class Rows(NamedTuple):
    """A field that is a long list of short lists.

    Attributes:
        decoder: of a list of rows.
        shape: what a row is, for people.
        take: is handed rows in order; raises BadRow.
    """

    decoder: msgspec.json.Decoder[Any]
    shape: str
    take: Callable[[list[Any]], None]


class BadRow(Exception):
    """The row with this number, of those that were handed over, is impossible."""

    def __init__(self, nr: int, reason: str) -> None:
        super().__init__(nr, reason)
        self.nr = nr
        self.reason = reason


class Scanner:
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


class Fields:
    """The fields of one dump, once `read` has returned.

    Args:
        kind: of metadata.
        numbers: fields that are numbers, and their ranges.
        rows: fields that are lists of rows.
        other: fields of other shapes; the function returns what is kept, and raises
            ValueError with what is wrong.
        optional: those of all these that need not be there.
    """

    def __init__(
        self,
        pieces: Iterable[bytes],
        kind: str,
        *,
        numbers: Mapping[str, tuple[int, int]],
        rows: Mapping[str, Rows],
        other: Mapping[str, Callable[[Any], Any]],
        optional: Iterable[str] = (),
    ) -> None:
        self._scanner = Scanner(pieces)
        self._kind = kind
        self._numbers = numbers
        self._rows = rows
        self._other = other
        self._known = (*_NAMES, *numbers, *rows, *other)
        self._required = [key for key in self._known if key not in {*optional}]
        self._values: dict[str, Any] = {}
        self._lines: dict[str, int] = {}

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __contains__(self, key: str) -> bool:
        return key in self._lines

    def get(self, key: str, default: object) -> Any:
        """Return what stands there, or `default`."""
        return self._values.get(key, default)

    def read(self) -> None:
        """Read the whole dump. Raises: BadDump."""
        scanner = self._scanner
        scanner.expect(b"{")
        while True:
            key = scanner.take(_TEXT, "the name of a field")
            scanner.expect(b":")
            if key not in self._known:
                raise scanner.error(f"unknown field {key!r}")
            if key in self._lines:
                raise scanner.error(f"{key} stands twice")
            scanner.peek()
            self._lines[key] = scanner.line
            if key in self._rows:
                self._read_rows(key, self._rows[key])
            else:
                self._values[key] = self._checked(
                    key, scanner.take(_VALUE, f"{key}: a value")
                )
            if scanner.expect(b",", b"}") == b"}":
                break
        for key in self._required:
            if key not in self._lines:
                raise scanner.error(f"{key} is missing")
        if scanner.peek():
            raise scanner.error(f"expected the end, found {scanner.shown()}")

    def bad(self, key: str, reason: str) -> BadDump:
        """Return the error for what stands in a field."""
        return BadDump(self._lines[key], f"{key}: {reason}")

    def expect(self, key: str, expected: int) -> None:
        """Raise BadDump unless the field says what follows from the others."""
        found = self._values[key]
        if found != expected:
            raise self.bad(
                key, f"expected {expected} (as the other fields say), found {found}"
            )

    def _checked(self, key: str, value: Any) -> Any:
        """Return `value` as it is kept."""
        error = self._scanner.error
        try:
            if key in self._numbers:
                return number(value, *self._numbers[key])
            if key in self._other:
                return self._other[key](value)
        except ValueError as wrong:
            raise error(f"{key}: {wrong}") from None
        match key:
            case "format" if value != DUMP_FORMAT:
                raise error(f"format: expected {DUMP_FORMAT!r}, found {value!r}")
            case "version" if value != DUMP_VERSION or isinstance(value, bool):
                raise error(f"version {value!r} of the dump is not supported")
            case "kind" if value != self._kind:
                raise error(f"kind: metadata of a {value!r} is not supported")
            case "uuid":
                return self._uuid(value)
            case "flags":
                return self._flags(value)
        return value

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

    # ---- rows ----

    def _read_rows(self, key: str, rows: Rows) -> None:
        scanner = self._scanner
        scanner.expect(b"[")
        if scanner.peek() == b"]":
            scanner.expect(b"]")
            return
        while True:
            scanner.peek()
            text = scanner.text
            end = _END_OF_ROWS.search(text, scanner.at)
            # All rows that can be seen whole: up to the end, or up to the last bracket.
            stop = end.start() + 1 if end else text.rfind(b"]", scanner.at) + 1
            if stop <= scanner.at:
                raise scanner.error(f"{key}: expected a run, found {scanner.shown()}")
            self._take_rows(key, rows, scanner.text[scanner.at : stop])
            scanner.advance(stop)
            if scanner.expect(b",", b"]") == b"]":
                return

    def _take_rows(self, key: str, rows: Rows, text: bytes) -> None:
        try:
            decoded = rows.decoder.decode(b"[" + text + b"]")
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise self._first_bad(key, rows, text) from None
        try:
            rows.take(decoded)
        except BadRow as wrong:
            line = self._line_of_row(text, wrong.nr)
            raise BadDump(line, f"{key}: {wrong.reason}") from None

    def _line_of_row(self, text: bytes, nr: int) -> int:
        at = 0
        for _ in range(nr):
            match = _ROW.match(text, at)
            assert match is not None
            at = match.end()
        at = text.index(b"[", at)
        return self._scanner.line + text.count(b"\n", 0, at)

    def _first_bad(self, key: str, rows: Rows, text: bytes) -> BadDump:
        """Find the row that cannot be decoded."""
        at = 0
        while match := _ROW.match(text, at):
            row = match[0].strip().removesuffix(b",")
            is_last = match.end() == len(text)
            has_comma = match[0].endswith(b",")
            try:
                rows.decoder.decode(b"[" + row + b"]")
            except (msgspec.DecodeError, UnicodeDecodeError):
                break
            if has_comma == is_last:
                break
            at = match.end()
        begin = at + len(text[at:]) - len(text[at:].lstrip())
        found = text[begin : begin + 40].split(b"\n")[0].decode("utf-8", "replace")
        return BadDump(
            self._scanner.line + text.count(b"\n", 0, begin),
            f"{key}: expected {rows.shape}, found {found!r}",
        )


def number(value: Any, least: int, most: int) -> int:
    """Return `value` if it is a number in this range. Raises: ValueError."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    if is_number and least <= value <= most:
        found: int = value
        return found
    raise ValueError(f"expected a number of {least} to {most}, found {value!r}")


class RunReader:
    """Takes rows [begin, count], ascending, into a bitmap of at most `bits_max` bits."""

    def __init__(self, bits_max: int) -> None:
        self.bits = bitarray(endian="little")
        self._bits_max = bits_max

    def take(self, runs: list[tuple[int, int]]) -> None:
        """Set the bits. Raises: BadRow."""
        bits = self.bits
        for nr, (begin, count) in enumerate(runs):
            end = begin + count
            if begin < len(bits) or count < 1 or end > self._bits_max:
                raise BadRow(nr, f"run [{begin}, {count}] is out of range or order")
            self.fill(begin)
            while len(bits) < end:
                first = len(bits)
                bits.extend(zeros(min(STEP_REGIONS, end - first), "little"))
                bits[first:] = True

    def fill(self, nr_bits: int) -> None:
        """Let there be `nr_bits` bits, if there are fewer."""
        bits = self.bits
        while len(bits) < nr_bits:
            bits.extend(zeros(min(STEP_REGIONS, nr_bits - len(bits)), "little"))

    def rows(self, shape: str) -> Rows:
        return Rows(_RUNS, shape, self.take)


_RUNS: Final = msgspec.json.Decoder(list[tuple[int, int]])
