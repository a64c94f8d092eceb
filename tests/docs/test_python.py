# SPDX-License-Identifier: Apache-2.0
"""The Python code in the documentation runs, and the page of the API names every public name."""

import inspect
import re
from pathlib import Path

import pytest

import nbdtarget
from tests.support.places import ROOT

FENCE = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HOW_TO = (ROOT / "docs/how-to/python.md").read_text()
REFERENCE = (ROOT / "docs/reference/python.md").read_text()
EXAMPLES = FENCE.findall(HOW_TO)


def test_examples_are_found() -> None:
    assert len(EXAMPLES) == HOW_TO.count("```python") == 5


@pytest.mark.parametrize("nr", range(len(EXAMPLES)))
def test_example_runs(nr: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "golden.img").write_bytes(bytes(1 << 20))
    monkeypatch.chdir(tmp_path)
    exec(compile(EXAMPLES[nr], f"example {nr} of python.md", "exec"), {})


@pytest.mark.parametrize("name", sorted(nbdtarget.__all__))
def test_reference_names_everything_that_is_exported(name: str) -> None:
    if name == "__version__":
        return
    assert f"`{name}" in REFERENCE
    exported = getattr(nbdtarget, name)
    if issubclass(exported, Exception):
        return
    members = [
        each
        for each in vars(exported)
        if not each.startswith("_") and not inspect.isdatadescriptor(each)
    ]
    assert members
    assert [each for each in members if f"`{each}" not in REFERENCE] == []
