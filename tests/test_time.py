# SPDX-License-Identifier: Apache-2.0
"""Whatever takes time in nbdtarget takes it from `clock.py`: what does not cannot be simulated."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "nbdtarget"
MODULES = sorted(p for p in PACKAGE.rglob("*.py") if p.name != "clock.py")

# Each for a reason. This list may only shrink.
EXCEPTIONS = {"cli/devices.py": "a command, with no loop, that waits to try again"}

# Names that are taken from the module asyncio, and methods of an event loop.
FROM_ASYNCIO = {"sleep", "timeout", "timeout_at", "wait_for"}
OF_A_LOOP = {"call_later", "call_at"}


def breaches(source: str) -> list[str]:
    """Lines of a module that take time from elsewhere, with what they take."""
    tree = ast.parse(source)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            taken = [a.name for a in node.names if a.name in ("time", "sched")]
        elif isinstance(node, ast.ImportFrom):
            taken = _from(node)
        elif isinstance(node, ast.Call):
            taken = _call(node)
        else:
            continue
        found += [f"{node.lineno}: {name}" for name in taken]
    return found


def _from(node: ast.ImportFrom) -> list[str]:
    if node.module == "time":
        return ["time"]
    if node.module != "asyncio":
        return []
    return [a.name for a in node.names if a.name in FROM_ASYNCIO]


def _call(node: ast.Call) -> list[str]:
    """A call of asyncio, or of a loop. `sleep(0)` takes a turn, not time."""
    if not isinstance(node.func, ast.Attribute):
        return []
    name, owner = node.func.attr, ast.unparse(node.func.value)
    if owner == "asyncio" and name in FROM_ASYNCIO:
        is_turn = name == "sleep" and [ast.unparse(a) for a in node.args] == ["0"]
        return [] if is_turn else [f"asyncio.{name}"]
    if owner == "asyncio" and name == "wait":
        return [f"asyncio.wait {k.arg}" for k in node.keywords if k.arg == "timeout"]
    if name in OF_A_LOOP and "clock" not in owner:
        return [f"{owner}.{name}"]
    return [f"{owner}.time"] if name == "time" and "loop" in owner else []


def test_time_comes_from_the_clock() -> None:
    found = {
        str(path.relative_to(PACKAGE)): breaches(path.read_text()) for path in MODULES
    }
    assert len(found) > 200
    assert {
        name: lines for name, lines in found.items() if lines and name not in EXCEPTIONS
    } == {}
    assert all(found[name] for name in EXCEPTIONS), "the list may shrink"


@pytest.mark.parametrize(
    "line",
    [
        "import time",
        "from time import monotonic",
        "from asyncio import sleep",
        "async def f(): await asyncio.sleep(0.1)",
        "asyncio.timeout(3)",
        "asyncio.wait_for(work, 3)",
        "asyncio.wait(tasks, timeout=3)",
        "asyncio.get_running_loop().call_later(1, f)",
        "self._loop.call_at(1, f)",
        "loop.time()",
    ],
)
def test_what_takes_time_elsewhere_is_found(line: str) -> None:
    assert breaches(line)


@pytest.mark.parametrize(
    "line",
    [
        "async def f(): await asyncio.sleep(0)",
        "self._clock.call_later(1, f)",
        "asyncio.wait(tasks)",
    ],
)
def test_what_takes_no_time_is_let_pass(line: str) -> None:
    assert breaches(line) == []
