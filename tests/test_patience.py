# SPDX-License-Identifier: Apache-2.0
"""Tests have patience: an upper limit for waiting that suits an idle machine fails on a busy one."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent
# Simulated time costs nothing; mutants are text.
OTHERS = ("sim", "mutants")
MODULES = sorted(
    path
    for path in ROOT.rglob("*.py")
    if path.relative_to(ROOT).parts[0] not in OTHERS and path != Path(__file__)
)
LONG_S = 60
MEANT_TO_END_S = 1  # what is shorter is a limit that the test wants to see exceeded

# Calls whose number is a limit, and keywords that are one.
CALLS = {"communicate", "join", "select", "settimeout", "timeout", "wait_for"}
REAL_CLOCKS = {"monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns"}
KEYWORDS = {"grace_s", "timeout", "timeout_s", "within_s"}


def short_limits(source: str) -> list[str]:
    """The limits of a module that are shorter than a busy machine needs, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        limits: list[ast.expr] = []
        if isinstance(node, ast.Call):
            limits = [it.value for it in node.keywords if it.arg in KEYWORDS]
            if _name(node.func) in CALLS:
                limits += node.args
        elif isinstance(node, ast.BinOp) and ast.unparse(node.left).endswith(
            "monotonic()"
        ):
            limits = [node.right]
        found += [
            f"{it.lineno}: {it.value}"
            for it in limits
            if isinstance(it, ast.Constant)
            and isinstance(it.value, int | float)
            and MEANT_TO_END_S <= it.value < LONG_S
            and not isinstance(it.value, bool)
        ]
    return found


def counted_waits(source: str) -> list[str]:
    """The loops of a module that sleep a number of times, and give up then, with their lines."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (
            isinstance(node, ast.For) and ast.unparse(node.iter).startswith("range(")
        ):
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


def speed_limits(source: str) -> list[int]:
    """The lines in which less real time must have passed than some limit."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Compare)
        and isinstance(node.ops[0], ast.Lt | ast.LtE)
        and isinstance(node.left, ast.BinOp)
        and isinstance(node.left.op, ast.Sub)
        and any(
            isinstance(it, ast.Call) and _name(it.func) in REAL_CLOCKS
            for it in ast.walk(node.left)
        )
    ]


def _name(func: ast.expr) -> str:
    if isinstance(func, ast.Attribute):
        return func.attr
    return func.id if isinstance(func, ast.Name) else ""


def test_tests_wait_for_what_is_sure_to_come() -> None:
    """Else they fail without a fault in the product: take PATIENCE_S of `tests/support/patience.py`."""
    found = {
        str(path.relative_to(ROOT)): limits
        for path in MODULES
        if (limits := short_limits(path.read_text()))
    }
    assert found == {}


def test_no_test_counts_how_often_it_looks() -> None:
    """How long that is depends on the machine: take `until` or `attempts` of `tests/support/patience.py`."""
    found = {
        str(path.relative_to(ROOT)): loops
        for path in MODULES
        if (loops := counted_waits(path.read_text()))
    }
    assert found == {}


def test_a_counted_wait_is_found() -> None:
    assert counted_waits("for _ in range(9):\n  if f(): break\n  sleep(0.01)")
    assert not counted_waits("for _ in range(9):\n  if f(): break\n  sleep(0)")
    assert not counted_waits("for _ in range(9):\n  f()\n  sleep(0.01)")


def test_no_test_asserts_speed() -> None:
    """Where it must be bounded, take the processor's time: `thread_time_ns`."""
    found = {
        str(path.relative_to(ROOT)): lines
        for path in MODULES
        if (lines := speed_limits(path.read_text()))
    }
    assert found == {}


def test_an_assertion_of_speed_is_found() -> None:
    assert speed_limits("assert time.monotonic() - begun < 5") == [1]
    assert not speed_limits("assert time.monotonic() - begun >= 0.5")
    assert not speed_limits("assert thread_time_ns() - begun < 5")


@pytest.mark.parametrize(
    "line",
    [
        "async def f(): await asyncio.wait_for(work, 5)",
        "asyncio.timeout(10)",
        "subprocess.run(argv, timeout=20)",
        "listener.close(grace_s=5.0)",
        "end = time.monotonic() + 30",
    ],
)
def test_a_short_limit_is_found(line: str) -> None:
    assert short_limits(line)


@pytest.mark.parametrize(
    "line",
    [
        "asyncio.timeout(PATIENCE_S)",
        "asyncio.timeout(0.02)",
        "subprocess.run(argv, timeout=300)",
        "device.events.wait(7)",
    ],
)
def test_what_is_long_or_meant_to_end_is_let_pass(line: str) -> None:
    assert short_limits(line) == []
