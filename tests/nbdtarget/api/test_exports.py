# SPDX-License-Identifier: Apache-2.0
"""`import nbdtarget` costs nothing, and type checkers see what there is."""

import ast
import subprocess
import sys

import pytest

import nbdtarget
from tests.support.places import ROOT


def test_import_brings_in_no_other_module_of_ours() -> None:
    code = "import sys, nbdtarget; print(sorted(m for m in sys.modules if m.startswith(('nbdtarget', 'asyncio', 'msgspec'))))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout == "['nbdtarget']\n"


@pytest.mark.parametrize("name", sorted(nbdtarget.__all__))
def test_exported_name_is_there(name: str) -> None:
    assert getattr(nbdtarget, name) is not None
    assert name in dir(nbdtarget)


def test_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = nbdtarget.nothing  # type: ignore[attr-defined]


def test_stub_names_the_same_homes() -> None:
    tree = ast.parse((ROOT / "nbdtarget/__init__.pyi").read_text())
    stub = {
        alias.asname: node.module
        for node in tree.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert stub == {
        name: getattr(nbdtarget, name).__module__
        for name in nbdtarget.__all__
        if name != "__version__"
    }
