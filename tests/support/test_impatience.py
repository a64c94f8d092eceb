# SPDX-License-Identifier: Apache-2.0
"""Tests of the search for code that makes a test fail on a busy machine."""

import ast

import pytest

from tests.support.impatience import counted_waits, short_limits, speed_limits


def nodes(source: str) -> list[ast.AST]:
    return list(ast.walk(ast.parse(source)))


def test_a_counted_wait_is_found() -> None:
    assert counted_waits(nodes("for _ in range(9):\n  if f(): break\n  sleep(0.01)"))
    assert not counted_waits(nodes("for _ in range(9):\n  if f(): break\n  sleep(0)"))
    assert not counted_waits(nodes("for _ in range(9):\n  f()\n  sleep(0.01)"))


def test_an_assertion_of_speed_is_found() -> None:
    assert speed_limits(nodes("assert time.monotonic() - begun < 5"))
    assert not speed_limits(nodes("assert time.monotonic() - begun >= 0.5"))
    assert not speed_limits(nodes("assert thread_time_ns() - begun < 5"))


@pytest.mark.parametrize(
    "line",
    [
        "async def f(): await asyncio.wait_for(work, 5)",
        "asyncio.timeout(10)",
        "subprocess.run(argv, timeout=20)",
        "listener.close(grace_s=5.0)",
        "end = time.monotonic() + 30",
        "RUN_S_MAX = 20.0\nasyncio.wait_for(steps, RUN_S_MAX)",
        "RUN_S_MAX: Final = 20\nselect([fd], [], [], RUN_S_MAX)",
    ],
)
def test_a_short_limit_is_found(line: str) -> None:
    assert short_limits(nodes(line))


@pytest.mark.parametrize(
    "line",
    [
        "asyncio.timeout(PATIENCE_S)",
        "asyncio.timeout(0.02)",
        "subprocess.run(argv, timeout=300)",
        "RUN_S_MAX = 100.0\nasyncio.wait_for(steps, RUN_S_MAX)",
        "device.events.wait(7)",
    ],
)
def test_what_is_long_or_meant_to_end_is_let_pass(line: str) -> None:
    assert short_limits(nodes(line)) == []
