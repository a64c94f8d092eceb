# SPDX-License-Identifier: Apache-2.0
"""Rows of the kernel's checklist, and the tests that stand for them."""

import ast
import functools

from tests.support.places import ROOT

__all__ = ["written_tests"]


@functools.cache
def written_tests() -> set[str]:
    """The names of all tests below `tests`."""
    return {
        node.name
        for path in (ROOT / "tests").rglob("test_*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
