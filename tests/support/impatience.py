# SPDX-License-Identifier: Apache-2.0
"""Finds code in tests that fails on a busy machine, for `tests/test_tidy.py`.

Each function takes the nodes of a module's tree, in any order.
"""

import ast
from collections.abc import Collection, Iterable
from typing import Final

__all__ = ["counted_waits", "short_limits", "speed_limits"]

LONG_S: Final = 60
MEANT_TO_END_S: Final = 1  # a shorter limit is one that the test wants to see exceeded

# Calls whose number is a limit, and keywords that are one.
CALLS: Final = {"communicate", "join", "select", "settimeout", "timeout", "wait_for"}
REAL_CLOCKS: Final = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
KEYWORDS: Final = {"grace_s", "timeout", "timeout_s", "within_s"}


def short_limits(nodes: Iterable[ast.AST]) -> list[str]:
    """The limits of a module that are shorter than a busy machine needs, with their lines. Some are constants of the module."""
    found = []
    nodes = [*nodes]
    constants = _constants(nodes)
    for node in nodes:
        limits: list[ast.expr] = []
        if isinstance(node, ast.Call):
            limits = [it.value for it in node.keywords if it.arg in KEYWORDS]
            if _name(node.func) in CALLS:
                limits += node.args
        elif isinstance(node, ast.BinOp) and _calls(node.left, {"monotonic"}):
            limits = [node.right]
        for it in limits:
            value = constants.get(it.id) if isinstance(it, ast.Name) else _number(it)
            if value is not None and MEANT_TO_END_S <= value < LONG_S:
                found.append(f"{it.lineno}: {ast.unparse(it)}")
    return found


def _constants(nodes: Iterable[ast.AST]) -> dict[str, float]:
    """The names that are written in capitals, and stand for a number."""
    found = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        else:
            continue
        value = None if node.value is None else _number(node.value)
        if value is not None and name.isupper():
            found[name] = value
    return found


def _number(node: ast.expr) -> float | None:
    if not isinstance(node, ast.Constant) or isinstance(node.value, bool):
        return None
    return node.value if isinstance(node.value, int | float) else None


def counted_waits(nodes: Iterable[ast.AST]) -> list[str]:
    """The loops of a module that sleep a number of times, and give up then, with their lines."""
    found = []
    for node in nodes:
        if not (isinstance(node, ast.For) and _calls(node.iter, {"range"})):
            continue
        inside = [it for statement in node.body for it in ast.walk(statement)]
        sleeps = any(
            isinstance(it, ast.Call)
            and _name(it.func) == "sleep"
            and ast.unparse(it.args[0]) != "0"
            for it in inside
        )
        if sleeps and any(isinstance(it, ast.Break | ast.Return) for it in inside):
            found.append(f"{node.lineno}: for {ast.unparse(node.target)}")
    return found


def speed_limits(nodes: Iterable[ast.AST]) -> list[str]:
    """The lines in which less real time must have passed than some limit."""
    return [
        f"{node.lineno}: {ast.unparse(node)}"
        for node in nodes
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Lt | ast.LtE)
        and isinstance(node.left, ast.BinOp)
        and isinstance(node.left.op, ast.Sub)
        and any(_calls(it, REAL_CLOCKS) for it in ast.walk(node.left))
    ]


def _calls(node: ast.AST, names: Collection[str]) -> bool:
    return isinstance(node, ast.Call) and _name(node.func) in names


def _name(func: ast.expr) -> str:
    if isinstance(func, ast.Attribute):
        return func.attr
    return func.id if isinstance(func, ast.Name) else ""
