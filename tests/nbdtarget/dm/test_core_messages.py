# SPDX-License-Identifier: Apache-2.0
"""Messages to a mapped device itself."""

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.dm.mapped_device import MappedDevice
from tests.support.dm import make_registry


async def device() -> MappedDevice:
    registry, _ = make_registry(a=8192)
    return await registry.create("d", "0 8 linear /a 0")


async def test_they_are_carried_out_whatever_the_sector() -> None:
    it = await device()
    it.deferred_remove = True
    assert await it.message(10**9, ["@CANCEL_deferred_remove"]) is None
    assert not it.deferred_remove
    for word, value in (("yes", True), ("no", False), ("AUTO", None)):
        await it.message(0, ["@rotational", word])
        assert it.said_rotational is value
    assert await it.message(0, ["@stats_create", "-", "/1"]) == "0"
    await it.remove()


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["@rotational"], "expected @rotational yes"),
        (["@rotational", "maybe"], "expected @rotational yes"),
        (["@rotational", "yes", "no"], "expected @rotational yes"),
        (["@frobnicate"], "Unsupported message `@frobnicate'"),
    ],
)
async def test_others_are_refused(words: list[str], reason: str) -> None:
    it = await device()
    with pytest.raises(TableError, match=reason):
        await it.message(0, words)
    await it.remove()
