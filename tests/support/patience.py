# SPDX-License-Identifier: Apache-2.0
"""Waiting for what is sure to come.

Only a failure takes so long: each wait ends as soon as what it waits for has come. A limit that suits an
idle machine fails on a busy one, and then says nothing about the product.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from typing import Final

__all__ = ["PATIENCE_S", "attempts", "until", "wait_until"]

# Real seconds. pytest prints the stacks of a test that takes 120 s, so a wait that never ends is shown before it fails.
PATIENCE_S: Final = 180.0


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what another task, a thread or a socket will bring about. Raises: TimeoutError."""
    async with asyncio.timeout(PATIENCE_S):
        while not condition():  # noqa: ASYNC110  # the condition has no Event
            await asyncio.sleep(0.001)


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait, without a loop, for what a process or a thread will bring about. Raises: TimeoutError."""
    end_s = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > end_s:
            raise TimeoutError
        time.sleep(0.005)


async def attempts() -> AsyncIterator[int]:
    """Number the attempts at what succeeds sooner or later, a moment apart. Raises: TimeoutError."""
    end_s = time.monotonic() + PATIENCE_S
    nr = 0
    while time.monotonic() < end_s:
        yield nr
        nr += 1
        await asyncio.sleep(0.005)
    raise TimeoutError
