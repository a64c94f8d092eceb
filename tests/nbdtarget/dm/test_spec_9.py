# SPDX-License-Identifier: Apache-2.0
"""Checklist 9: dmsetup's verbs and the rules of tables, as far as no other file tests them.

The rows, and the tests that stand for each: docs/kernel-checklist.md.
"""

import pytest

from nbdtarget.bio import OP_READ
from nbdtarget.common.errors import ConstructorError, NbdTargetError, TableError
from nbdtarget.dm.names import NAME_LENGTH_MAX, UUID_LENGTH_MAX
from tests.support.dm import make, make_registry, submit


async def test_9_lengths_of_names_and_uuids() -> None:
    registry, _ = make_registry()
    name, uuid = "n" * NAME_LENGTH_MAX, "u" * UUID_LENGTH_MAX
    assert (len(name), len(uuid)) == (127, 128)
    await registry.create(name, "0 8 zero", uuid=uuid)
    for long_name, long_uuid in ((name + "n", ""), ("x", uuid + "u")):
        with pytest.raises(TableError, match="is longer than"):
            await registry.create(long_name, "0 8 zero", uuid=long_uuid)
    with pytest.raises(TableError, match="is longer than"):
        registry.rename(name, name + "n")


async def test_9_device_must_be_large_enough() -> None:
    registry, opener = make_registry(a=4096)
    with pytest.raises(ConstructorError, match="/a too small for target: start=1"):
        await registry.create("x", "0 8 linear /a 1")
    assert opener.still_open == []


async def test_9_clear_drops_the_inactive_table_only() -> None:
    device, registry, opener = await make("0 8 linear /a 0", a=4096, b=4096)
    await registry.load("x", "0 8 linear /b 0")
    for _ in range(2):
        await registry.clear("x")
        assert device.table(inactive=True) == []
        assert opener.still_open == ["/a"]
    assert device.table() == [(0, 8, "linear", "/a 0")]


async def test_9_remove_force_fails_io_before_it_is_refused() -> None:
    device, registry, _ = await make("0 8 linear /a 0", a=4096)
    registry.acquire("x")
    with pytest.raises(TableError, match="busy"):
        await registry.remove("x", force=True)
    assert device.table() == [(0, 8, "error", "")]
    registry.release(device)
    await registry.remove("x", force=True)
    assert registry.devices() == []


async def test_9_wipe_table_keeps_the_size_and_fails_all_io() -> None:
    device, registry, opener = await make("0 16 linear /a 0\n16 8 zero", a=8192)
    await registry.wipe_table("x")
    assert device.table() == [(0, 24, "error", "")]
    assert submit(device, OP_READ, 0, 512).status == 5  # EIO
    assert opener.still_open == []


async def test_9_what_counts_as_an_event() -> None:
    device, registry, _ = await make("0 8 probe /a /b", a=4096, b=4096)
    assert device.event_nr == 0
    await registry.load("x", "0 8 probe /a /b")
    await device.suspend()
    await device.resume()
    assert device.event_nr == 0
    await device.message(0, ["event"])
    assert device.event_nr == 1
    registry.rename("x", "y")
    assert device.event_nr == 2
    registry.set_uuid("y", "U")
    assert device.event_nr == 3
    with pytest.raises(NbdTargetError):
        registry.set_uuid("y", "V")
    assert device.event_nr == 3
    await registry.remove("y")
    assert device.event_nr == 4
