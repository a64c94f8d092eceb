# SPDX-License-Identifier: Apache-2.0
"""Where values stand in a TOML document."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.config.lines import Path, value_lines
from nbdtarget.config.render import _string

DOCUMENT = '''\
# a comment with = and [brackets]
a = 1
"b\\u0062" = "#no comment"   # but this is
c = [1, # one
  "]", [2,
   3], ]
d.e = { f = "}", "g" = 'x' }

[table]   # [not.this]
long = """
first
[no.header]
x = 1 \\" """
short = 0x1f
[table.'in ner']
t = 1979-05-27 07:32:00
[[many]]
k = \'\'\'it's'\'\'\'\'
[[many]]
k = ""
[many.sub]
k = true
'''


def paths(value: Any, path: Path = ()) -> set[Path]:
    found = {path} if path else set()
    if isinstance(value, dict):
        for key, inner in value.items():
            found |= paths(inner, (*path, key))
    elif isinstance(value, list):
        for nr, inner in enumerate(value):
            found |= paths(inner, (*path, nr))
    return found


def test_lines_of_everything() -> None:
    lines = value_lines(DOCUMENT)
    content = {("table", "long", nr) for nr in range(3)} | {("many", 0, "k", 0)}
    assert set(lines) == paths(tomllib.loads(DOCUMENT)) | content
    shown = {".".join(map(str, path)): line for path, line in lines.items()}
    assert shown == {
        "a": 2,
        "bb": 3,
        "c": 4,
        "c.0": 4,
        "c.1": 5,
        "c.2": 5,
        "c.2.0": 5,
        "c.2.1": 6,
        "d": 7,
        "d.e": 7,
        "d.e.f": 7,
        "d.e.g": 7,
        "table": 9,
        "table.long": 11,
        "table.long.0": 11,
        "table.long.1": 12,
        "table.long.2": 13,
        "table.short": 14,
        "table.in ner": 15,
        "table.in ner.t": 16,
        "many": 17,
        "many.0": 17,
        "many.0.k": 18,
        "many.0.k.0": 18,
        "many.1": 19,
        "many.1.k": 20,
        "many.1.sub": 21,
        "many.1.sub.k": 22,
    }


@pytest.mark.parametrize("text", ["", "\n\n", "# only this", "[a]\n[a.b]"])
def test_little_documents(text: str) -> None:
    assert set(value_lines(text)) == paths(tomllib.loads(text))


@given(st.dictionaries(st.text(min_size=1), st.text(), max_size=4))
def test_any_key_and_string_stands_on_its_line(values: dict[str, str]) -> None:
    text = "".join(f"{_string(k)} = {_string(v)}\n" for k, v in values.items())
    assert tomllib.loads(text) == values
    assert value_lines(text) == {(k,): nr for nr, k in enumerate(values, 1)}
