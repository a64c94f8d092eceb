# SPDX-License-Identifier: Apache-2.0
"""Devices that could not be opened again after a hand-over are tried again until they are open, are removed, or get another table."""

import asyncio

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.dm import reopenings
from tests.support.dm import make_registry
from tests.support.patience import until


async def test_attempts_follow_each_other_until_one_succeeds(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(reopenings, "RETRY_S_MIN", 0.001)
    monkeypatch.setattr(reopenings, "RETRY_S_MAX", 0.002)
    registry, _ = make_registry()
    device = await registry.create("d", None)
    left = [True, True, True]

    async def attempt() -> bool:
        if left:
            left.pop()
            raise TableError("not yet")
        return True

    opened = []
    registry.reopenings.opened = lambda: opened.append(1)
    registry.reopenings.start(device, attempt)
    assert device in registry.reopenings
    await until(lambda: device not in registry.reopenings)
    assert "/dev/mapper/d: is open again" in caplog.text
    assert opened == [1]
    await registry.close()


async def test_a_device_that_was_removed_is_not_tried_any_more() -> None:
    registry, _ = make_registry()
    device = await registry.create("d", None)

    async def attempt() -> bool:
        raise AssertionError("it is gone")

    registry.reopenings.start(device, attempt)
    await registry.remove("d")
    registry.reopenings.try_now()
    await until(lambda: device not in registry.reopenings)
    await registry.close()


async def test_a_bug_ends_one_of_them_and_the_end_of_the_server_all(
    caplog: pytest.LogCaptureFixture,
) -> None:
    registry, _ = make_registry()
    buggy, hung = [await registry.create(name, None) for name in "bh"]
    hangs = asyncio.Event()

    async def fail() -> bool:
        raise AssertionError("a bug")

    async def hang() -> bool:
        hangs.set()
        await asyncio.Event().wait()
        return True

    registry.reopenings.start(buggy, fail)
    registry.reopenings.start(hung, hang)
    registry.reopenings.try_now()
    await until(lambda: buggy not in registry.reopenings)
    assert "a bug" in caplog.text
    await hangs.wait()
    await registry.close()
    assert hung not in registry.reopenings
