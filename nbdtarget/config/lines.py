# SPDX-License-Identifier: Apache-2.0
"""On which line of a TOML document each value stands.

The standard parser tells values, not places, and a mistake must be named with its line. So
this walks over a document **that is known to be valid** and notes where each key's value
begins; it judges nothing, and understands no more of TOML than that takes: keys, table
headers, strings that may hold anything, arrays, inline tables.
"""

import re
from typing import Final

__all__ = ["Path", "value_lines"]

Path = tuple[str | int, ...]

_BLANK: Final = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_KEY: Final = re.compile(r"\"((?:[^\"\\\n]|\\.)*)\"|'([^'\n]*)'|([A-Za-z0-9_-]+)")
# Three to five quotes end a long string: up to two of them belong to it.
_STRING: Final = re.compile(
    r"\"\"\"(?:[^\\]|\\.)*?\"{3,5}|'''.*?'{3,5}|\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'",
    re.DOTALL,
)
_SCALAR: Final = re.compile(r"[^,\]}\n#]+")


def value_lines(text: str) -> dict[Path, int]:
    """Return the line, from 1, on which each value begins, by its path.

    Tables stand at their header; an array's elements have numbers from 0 in their paths. A
    string of several lines counts from its first line of content, and each of these lines has
    a number from 0 behind the string's path, as an element has.
    """
    return _Walk(text).document()


class _Walk:
    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Path, int] = {}
        self._counts: dict[Path, int] = {}  # tables of each array of tables so far

    def document(self) -> dict[Path, int]:
        table: Path = ()
        while self._skip_blank():
            if self._take("[["):
                table = self._of_arrays(self._key())
                self._counts[table] = self._counts.get(table, -1) + 1
                table = (*table, self._counts[table])
                self._note(table)
                self._expect("]]")
            elif self._take("["):
                table = self._of_arrays(self._key())
                self._note(table)
                self._expect("]")
            else:
                self._pair(table)
        return self._lines

    def _pair(self, table: Path) -> None:
        path = (*table, *self._key())
        self._expect("=")
        self._value(path)

    def _value(self, path: Path) -> None:
        self._skip_blank()
        self._note(path)
        if self._take("["):
            index = 0
            while self._skip_blank() and not self._take("]"):
                self._value((*path, index))
                index += 1
                self._skip_blank()
                self._take(",")
        elif self._take("{"):
            while self._skip_blank() and not self._take("}"):
                self._pair(path)
                self._skip_blank()
                self._take(",")
        elif string := _STRING.match(self._text, self._at):
            self._content(path, string[0])
            self._at = string.end()
        else:
            scalar = _SCALAR.match(self._text, self._at)
            assert scalar is not None, "the document is valid"
            self._at = scalar.end()

    def _content(self, path: Path, string: str) -> None:
        """Note the lines of a string of several."""
        if not string.startswith(('"""', "'''")):
            return
        count = string.count("\n") + 1
        if re.match(r"...\r?\n", string):
            self._lines[path] += 1  # this line break is not part of the string
            count -= 1
        for nr in range(count):
            self._lines[(*path, nr)] = self._lines[path] + nr

    def _key(self) -> Path:
        """A key, dotted or not."""
        parts: list[str] = []
        while True:
            self._skip_blank()
            match = _KEY.match(self._text, self._at)
            assert match is not None, "the document is valid"
            basic, literal, bare = match.groups()
            parts.append(_unescaped(basic) if basic is not None else literal or bare)
            self._at = match.end()
            self._skip_blank()
            if not self._take("."):
                return tuple(parts)

    def _of_arrays(self, path: Path) -> Path:
        """The path of a header, with the number of the latest table of each array in it."""
        out: Path = ()
        for nr, part in enumerate(path):
            out = (*out, part)
            if out in self._counts and nr < len(path) - 1:
                out = (*out, self._counts[out])
        return out

    def _note(self, path: Path) -> None:
        line = self._text.count("\n", 0, self._at) + 1
        for length in range(1, len(path)):
            self._lines.setdefault(path[:length], line)
        self._lines[path] = line

    def _skip_blank(self) -> bool:
        """Skip to what is next; False at the end."""
        blank = _BLANK.match(self._text, self._at)
        assert blank is not None
        self._at = blank.end()
        return self._at < len(self._text)

    def _take(self, token: str) -> bool:
        taken = self._text.startswith(token, self._at)
        self._at += len(token) * taken
        return taken

    def _expect(self, token: str) -> None:
        self._skip_blank()
        taken = self._take(token)
        assert taken, "the document is valid"


def _unescaped(basic: str) -> str:
    if "\\" not in basic:
        return basic
    return re.sub(
        r"\\(?:u([0-9a-fA-F]{4})|U([0-9a-fA-F]{8})|(.))",
        lambda m: _ESCAPES[m[3]] if m[3] else chr(int(m[1] or m[2], 16)),
        basic,
    )


_ESCAPES: Final = {
    "b": "\b",
    "t": "\t",
    "n": "\n",
    "f": "\f",
    "r": "\r",
    '"': '"',
    "\\": "\\",
}
