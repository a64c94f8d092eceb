# SPDX-License-Identifier: Apache-2.0
"""The registry: names, who may open what, and that a refusal leaves nothing behind."""

import asyncio
import errno as errnos

import pytest

from nbdtarget.bio import OP_READ, OP_WRITE
from nbdtarget.common.errors import (
    ConstructorError,
    NbdTargetError,
    ResolveError,
    TableError,
)
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import State
from nbdtarget.targets import disks
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import settle
from tests.support.dm import ProbeTarget, RamOpener, content, make_registry, submit
from tests.support.patience import PATIENCE_S


@pytest.mark.parametrize(
    "name", ["", "a/b", ".", "..", "control", "x" * 128, "a\nb", "\udcff", "é" * 64]
)
async def test_create_refuses_a_name(name: str) -> None:
    registry, _ = make_registry()
    with pytest.raises(TableError):
        await registry.create(name, "0 8 zero")


async def test_create_refuses_a_name_or_uuid_that_is_taken() -> None:
    registry, _ = make_registry()
    await registry.create("x", "0 8 zero", uuid="u")
    for name, uuid in (("x", ""), ("y", "u")):
        with pytest.raises(TableError) as caught:
            await registry.create(name, "0 8 zero", uuid=uuid)
        assert caught.value.errno == errnos.EBUSY


async def test_create_that_fails_leaves_nothing() -> None:
    registry, opener = make_registry(a=4096)
    with pytest.raises(ConstructorError, match="Device lookup failed: /b: No such"):
        await registry.create("x", "0 8 linear /a 0\n8 8 linear /b 0")
    assert registry.devices() == []
    assert opener.still_open == []


async def test_created_file_is_removed_when_its_own_constructor_refuses() -> None:
    registry, opener = make_registry(b=4096)
    with pytest.raises(ConstructorError, match="probe: Invalid probe"):
        await registry.create("x", "0 8 probe /new /b fail")
    assert opener.created == ["/new"]
    assert "/new" not in opener.sizes
    assert opener.still_open == []


async def test_created_file_is_removed_when_the_first_resume_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def refuse(_: ProbeTarget) -> None:
        raise TableError("not today")

    monkeypatch.setattr(ProbeTarget, "preresume", refuse)
    registry, opener = make_registry(b=4096)
    with pytest.raises(TableError, match="not today"):
        await registry.create("x", "0 8 probe /new /b")
    assert opener.created == ["/new"]
    assert "/new" not in opener.sizes
    assert opener.still_open == []
    assert registry.devices() == []


async def test_created_file_is_removed_when_a_later_line_is_refused() -> None:
    registry, opener = make_registry(b=4096)
    with pytest.raises(ConstructorError):
        await registry.create("x", "0 8 probe /new /b\n8 8 linear /missing 0")
    assert ProbeTarget.lives == ["ctr", "dtr"]
    assert "/new" not in opener.sizes
    assert opener.still_open == []


async def test_bad_last_line_opens_nothing() -> None:
    registry, opener = make_registry(b=4096)
    with pytest.raises(TableError, match="Gap in table"):
        await registry.create("x", "0 8 probe /new /b\n9 8 zero")
    assert opener.open == {}


async def test_create_that_is_refused_at_preresume_leaves_nothing() -> None:
    registry, opener = make_registry(a=4096, b=4096)
    with pytest.raises(TableError, match="will not"):
        await registry.create("x", "0 8 probe /a /b refuse")
    assert registry.devices() == []
    assert opener.still_open == []


async def test_load_that_fails_leaves_both_tables_as_they_were() -> None:
    registry, opener = make_registry(a=4096, b=4096)
    device = await registry.create("x", "0 8 linear /a 0")
    await registry.load("x", "0 8 linear /b 0")
    with pytest.raises(ConstructorError):
        await registry.load("x", "0 8 linear /c 0")
    assert device.table() == [(0, 8, "linear", "/a 0")]
    assert device.table(inactive=True) == [(0, 8, "linear", "/b 0")]
    await registry.clear("x")
    assert opener.still_open == ["/a"]


async def test_live_and_inactive_table_share_one_device() -> None:
    registry, opener = make_registry(a=4096)
    device = await registry.create("x", "0 4 linear /a 0\n4 4 linear /a 4")
    first = opener.open["/a"]
    await registry.load("x", "0 8 linear /a 0")
    assert opener.open["/a"] is first
    await device.resume()
    assert not first.closed
    await registry.remove("x")
    assert first.closed


async def test_device_of_one_target_alone_is_refused_to_another_by_any_name() -> None:
    registry, opener = make_registry(a=4096, s=4096)
    opener.sizes["/alias-a"] = 4096
    await registry.create("x", "0 8 probe /a /s")
    for name in ("/a", "/alias-a"):
        for read_only in (False, True):
            with pytest.raises(ConstructorError, match="in use by x") as caught:
                await registry.create("y", f"0 8 linear {name} 0", read_only=read_only)
            assert caught.value.errno == errnos.EBUSY
    await registry.remove("x")
    await registry.create("y", "0 8 linear /alias-a 0")


async def test_device_opened_at_the_same_time_by_two_is_opened_once() -> None:
    registry, opener = make_registry(a=4096)
    answers = await asyncio.gather(
        registry.create("x", "0 8 linear /a 0"),
        registry.create("y", "0 8 linear /a 0"),
        return_exceptions=True,
    )
    assert not any(isinstance(answer, NbdTargetError) for answer in answers)
    assert opener.opened == ["/a"]


async def test_slices_of_one_disk_are_written_through_one_device() -> None:
    registry, opener = make_registry(a=8192)
    devices = [
        await registry.create("x", "0 8 linear /a 0"),
        await registry.create("y", "0 8 linear /a 8"),
        await registry.create("z", "0 16 delay /a 0 0", read_only=True),
    ]
    assert opener.opened == ["/a"]
    for device, data in zip(devices, (b"low", b"high"), strict=False):
        assert submit(device, OP_WRITE, 0, data).status == 0
    assert opener.open["/a"].data[4096:4100] == b"high"
    assert content(submit(devices[2], OP_READ, 0, 3)) == b"low"
    await registry.remove("x")
    await registry.remove("z")
    assert opener.still_open == ["/a"]
    await registry.remove("y")
    assert opener.still_open == []


async def test_device_that_is_open_read_only_stays_so() -> None:
    registry, _ = make_registry(a=8192)
    await registry.create("x", "0 8 linear /a 0", read_only=True)
    with pytest.raises(ConstructorError, match="open read-only by x"):
        await registry.create("y", "0 8 linear /a 0")
    await registry.remove("x")
    await registry.create("y", "0 8 linear /a 0")


# Table lines that open /a: for the table alone, as a source that is only read, shared, and read-only.
ALONE, SOURCE = "probe /a /s", "probe /o /a"
PLAIN, READ = "linear /a 0", "linear /a 0 (read-only)"


@pytest.mark.parametrize(
    ("first", "second", "allowed"),
    [
        (PLAIN, PLAIN, True),
        (PLAIN, READ, True),
        (READ, READ, True),
        (SOURCE, READ, True),
        (READ, SOURCE, True),
        (ALONE, PLAIN, False),
        (PLAIN, ALONE, False),
        (ALONE, READ, False),
        (READ, ALONE, False),
        (SOURCE, PLAIN, False),
        (PLAIN, SOURCE, False),
        (SOURCE, ALONE, False),
        (ALONE, SOURCE, False),
    ],
)
async def test_who_may_share_a_device_with_whom(
    first: str, second: str, allowed: bool
) -> None:
    registry, opener = make_registry(a=4096, s=4096, o=4096, t=4096, p=4096)

    async def create(name: str, line: str) -> None:
        words, _, read_only = line.partition(" (")
        if name == "y":  # nothing else is shared
            words = words.replace("/s", "/t").replace("/o", "/p")
        await registry.create(name, f"0 8 {words}", read_only=bool(read_only))

    await create("x", first)
    before = opener.still_open
    if allowed:
        await create("y", second)
        assert opener.opened.count("/a") == 1
    else:
        with pytest.raises(NbdTargetError, match=r"/a: (in use|open read-only) by x"):
            await create("y", second)
        assert opener.still_open == before
    await registry.close()
    assert opener.still_open == []


async def test_each_mapped_device_on_another_is_one_opener() -> None:
    registry, _ = make_registry(a=8192)
    lower = await registry.create("lower", "0 16 linear /a 0")
    for name in ("x", "y"):
        await registry.create(name, "0 8 linear /dev/mapper/lower 0")
    await registry.load("x", "0 8 linear /dev/mapper/lower 8")
    assert lower.open_count == 2
    await registry.remove("x")
    assert lower.open_count == 1
    await registry.remove("lower", deferred=True)
    await registry.remove("y")
    await asyncio.sleep(0)
    assert registry.devices() == []


async def test_table_alone_is_refused_while_sources_are_read() -> None:
    registry, opener = make_registry(a=4096)
    await registry.create("x", "0 8 linear /a 0", read_only=True)
    await registry.create("y", "0 8 linear /a 0", read_only=True)
    assert len(opener.still_open) == 1
    with pytest.raises(ConstructorError, match="open read-only by x, y"):
        await registry.create("z", "0 8 linear /a 0")
    await registry.remove("x")
    assert opener.still_open == ["/a"]
    await registry.remove("y")
    assert opener.still_open == []


async def test_one_target_never_gets_one_device_twice() -> None:
    registry, opener = make_registry(a=4096)
    opener.sizes["/alias-a"] = 4096
    with pytest.raises(ResolveError, match="stands twice"):
        await registry.create("x", "0 8 probe /a /alias-a")
    assert opener.still_open == []


async def test_tables_stack() -> None:
    registry, opener = make_registry(a=8192)
    lower = await registry.create("lower", "0 16 linear /a 0")
    upper = await registry.create("upper", "0 8 linear /dev/mapper/lower 8")
    assert submit(upper, OP_WRITE, 0, b"deep").status == 0
    assert opener.open["/a"].data[4096:4100] == b"deep"
    assert (lower.open_count, registry.deps(upper)) == (1, ["/dev/mapper/lower"])
    with pytest.raises(TableError, match="busy"):
        await registry.remove("lower")
    await registry.create("other", "0 8 linear /dev/mapper/lower 0")
    assert lower.open_count == 2
    assert await registry.remove_all() == []
    assert opener.still_open == []


@pytest.mark.parametrize("name", ["lower", "upper"])
async def test_table_that_would_stand_on_itself_is_refused(name: str) -> None:
    registry, _ = make_registry(a=4096)
    await registry.create("lower", "0 8 linear /a 0")
    await registry.create("upper", "0 8 linear /dev/mapper/lower 0")
    with pytest.raises(ConstructorError, match="stand on itself"):
        await registry.load("lower", f"0 8 linear /dev/mapper/{name} 0")


async def test_remove_refuses_a_device_that_is_open() -> None:
    registry, _ = make_registry()
    device = await registry.create("x", "0 8 zero")
    assert registry.acquire("x") is device
    for force in (False, True):
        with pytest.raises(TableError) as caught:
            await registry.remove("x", force=force)
        assert caught.value.errno == errnos.EBUSY
        assert str(caught.value).endswith("busy: in use by 1 NBD connection")
    assert device.table() == [(0, 8, "error", "")]
    assert await registry.remove_all() == ["x"]
    registry.release(device)
    await registry.remove("x")


async def test_exports_are_devices_with_a_table_or_with_one_that_could_not_be_opened() -> (
    None
):
    registry, _ = make_registry()
    with pytest.raises(KeyError):
        registry.acquire("x")
    device = await registry.create("x", "0 8 zero")
    bare = await registry.create("bare", None)
    assert registry.maybe_get("x") is device
    assert registry.maybe_get("bare") is None
    assert list(registry.names()) == [("x", "")]
    assert list(registry.claimed_names()) == ["x"]
    bare.failure = "its file is gone"
    assert list(registry.names()) == [("x", "")]
    assert set(registry.claimed_names()) == {"x", "bare"}


async def test_rename() -> None:
    registry, _ = make_registry()
    device = await registry.create("x", "0 8 zero")
    await registry.create("y", "0 8 zero")
    with pytest.raises(TableError):
        registry.rename("x", "y")
    registry.rename("x", "z")
    assert registry.get("/dev/mapper/z") is device
    assert device.event_nr == 1
    with pytest.raises(TableError, match="Device does not exist"):
        registry.get("x")


async def test_minor_numbers_are_the_lowest_free() -> None:
    registry, _ = make_registry()
    for name in ("a", "b", "c"):
        await registry.create(name, "0 8 zero")
    await registry.remove("b")
    assert (await registry.create("d", "0 8 zero")).minor == 1


async def test_close_removes_everything_although_bios_wait_below() -> None:
    registry, opener = make_registry(a=4096)
    lower = await registry.create("lower", "0 8 linear /a 0")
    upper = await registry.create("upper", "0 8 linear /dev/mapper/lower 0")
    await lower.suspend()
    bio = submit(upper, OP_WRITE, 0, b"stuck")
    registry.acquire("upper")
    await registry.close()
    assert bio.status == errnos.EIO
    assert opener.still_open == []
    assert upper.state is lower.state is State.REMOVED


async def test_connection_whose_last_bio_outlives_close_may_release() -> None:
    registry, opener = make_registry(a=4096)
    device = await registry.create("x", "0 8 linear /a 0")
    opener.open["/a"].hold = True
    held = registry.acquire("x")
    write = submit(device, OP_WRITE, 0, b"late")
    write.on_end(lambda _: registry.release(held))
    closing = asyncio.ensure_future(registry.close())
    await settle()
    opener.open["/a"].let_go()
    await closing
    assert write.status == 0


async def test_create_that_is_overtaken_by_remove_leaves_the_next_device_alone() -> (
    None
):
    registry, opener = make_registry(a=4096)
    may_open = asyncio.Event()

    async def open_later(name: str, *, read_only: bool) -> Device:
        await may_open.wait()
        return await RamOpener.open_device(opener, name, read_only=read_only)

    opener.open_device = open_later  # type: ignore[method-assign]  # a slow one
    creating = asyncio.ensure_future(registry.create("x", "0 8 linear /a 0"))
    await asyncio.sleep(0)
    await registry.remove("x")
    second = await registry.create("x", None)
    may_open.set()
    with pytest.raises(TableError, match="does not exist"):
        await creating
    assert registry.get("x") is second
    assert opener.still_open == []


async def test_close_ends_extents_that_wait_for_a_suspended_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The clone asks its source first which disk it is, and a suspended one does not answer.
    monkeypatch.setattr(disks, "ANSWER_S_MAX", 0.01)
    metadata_size = CloneMetadata.device_size_for(4)
    registry, _ = make_registry(m=metadata_size, d=16384, s=16384)
    await registry.create("low", "0 32 linear /s 0")
    await registry.suspend("low")
    # Hydration asks its source, the suspended device, for holes.
    await registry.create("up", "0 32 clone /m /d /dev/mapper/low 8")
    await settle()
    async with asyncio.timeout(PATIENCE_S):
        await registry.close()


async def test_close_waits_for_a_load_that_has_opened_a_mapped_device() -> None:
    registry, opener = make_registry(m=1 << 20, d=65536, s=65536)
    await registry.create("meta", "0 2048 linear /m 0")
    await registry.create("upper", None)
    opener.open["/m"].hold = True
    table = "0 128 clone /dev/mapper/meta /d /s 8"
    loading = asyncio.ensure_future(registry.load("upper", table))
    await settle()
    closing = asyncio.ensure_future(registry.close())
    await settle()
    assert not closing.done()
    with pytest.raises(TableError, match="the server is stopping"):
        await registry.load("meta", "0 8 zero")
    opener.open["/m"].let_go()
    await closing
    with pytest.raises(TableError, match="does not exist"):
        await loading
    assert opener.still_open == []


async def test_close_while_a_lower_device_is_being_suspended() -> None:
    metadata_size = CloneMetadata.device_size_for(4)
    registry, opener = make_registry(m=metadata_size, d=16384, s=16384)
    low = await registry.create("low", "0 32 linear /d 0")
    up = await registry.create(
        "up", "0 32 clone /m /dev/mapper/low /s 8 1 no_hydration"
    )
    opener.open["/d"].hold = True
    read = submit(low, OP_READ, 0, 512)
    suspending = asyncio.ensure_future(registry.suspend("low"))
    await settle()
    write = submit(up, OP_WRITE, 0, bytes(4096))
    closing = asyncio.ensure_future(registry.close())
    await settle()
    opener.open["/d"].let_go()
    async with asyncio.timeout(PATIENCE_S):
        await asyncio.gather(closing, suspending)
    assert (read.status, write.status) == (0, errnos.EIO)
    with pytest.raises(TableError, match="stopping"):
        await registry.suspend("low")


@pytest.mark.parametrize("second", ["clone /m /e /t 8", "clone /n /d /t 8"])
async def test_two_clones_of_one_table_share_nothing_that_they_write(
    second: str,
) -> None:
    # With one metadata, regions that the first has copied would count for the second.
    size = CloneMetadata.device_size_for(4)
    registry, opener = make_registry(m=size, n=size, d=16384, e=16384, s=16384, t=16384)
    with pytest.raises(ConstructorError, match="another target of this table"):
        await registry.create("x", f"0 32 clone /m /d /s 8\n32 32 {second}")
    assert opener.still_open == []


async def test_linear_may_use_the_rest_of_a_clones_destination() -> None:
    size = CloneMetadata.device_size_for(4)
    registry, opener = make_registry(m=size, d=32768, s=16384)
    device = await registry.create("x", "0 32 clone /m /d /s 8\n32 32 linear /d 32")
    submit(device, OP_WRITE, 16384, b"x" * 512)
    assert opener.open["/d"].data[16384] == ord("x")
    await registry.close()


async def test_deferred_remove_waits_for_the_last_opener() -> None:
    registry, opener = make_registry(a=8192)
    await registry.create("low", "0 8 linear /a 0")
    await registry.create("top", "0 8 linear /dev/mapper/low 0")
    low = registry.get("low")
    connection = registry.acquire("low")
    await registry.remove("low", deferred=True)
    assert low.deferred_remove
    await registry.remove("top")
    await settle()
    assert registry.devices() == [low]
    registry.release(connection)
    await settle()
    assert registry.devices() == []
    assert opener.still_open == []
    await registry.close()


async def test_deferred_remove_of_what_nobody_holds_is_a_remove() -> None:
    registry, _ = make_registry(a=8192)
    await registry.create("x", "0 8 linear /a 0")
    await registry.remove("x", deferred=True)
    assert registry.devices() == []
    await registry.close()


async def test_deferred_remove_can_be_cancelled_until_it_happens() -> None:
    registry, _ = make_registry(a=8192)
    device = await registry.create("x", "0 8 linear /a 0")
    first = registry.acquire("x")
    await registry.remove("x", deferred=True)
    assert await device.message(0, ["@cancel_deferred_remove"]) is None
    registry.release(first)
    await settle()
    assert registry.devices() == [device]
    # Opened again between the last close and the removal.
    first = registry.acquire("x")
    await registry.remove("x", deferred=True)
    registry.release(first)
    second = registry.acquire("x")
    await settle()
    assert registry.devices() == [device]
    registry.release(second)
    await registry.close()
    assert registry.devices() == []


async def test_close_right_after_the_last_opener_of_a_deferred_one() -> None:
    registry, opener = make_registry(a=8192)
    await registry.create("x", "0 8 linear /a 0")
    held = registry.acquire("x")
    await registry.remove("x", deferred=True)
    registry.release(held)
    await registry.close()
    assert registry.devices() == []
    assert opener.still_open == []


async def test_uuid_is_set_once() -> None:
    registry, _ = make_registry()
    await registry.create("x", None)
    await registry.create("y", None, uuid="U-Y")
    for uuid, reason in [
        ("", "empty"),
        ("U-Y", "UUID exists"),
        ("u" * 129, "longer"),
        ("a\n\x1b[2J", "unprintable"),
    ]:
        with pytest.raises(TableError, match=reason):
            registry.set_uuid("x", uuid)
    registry.set_uuid("x", "U-X")
    assert (registry.get("x").uuid, registry.get("x").event_nr) == ("U-X", 1)
    with pytest.raises(TableError, match="Invalid argument: the device has a UUID"):
        registry.set_uuid("x", "U-Z")
    await registry.close()


async def test_minor_numbers_of_choice() -> None:
    registry, _ = make_registry()
    assert (await registry.create("x", None, minor=7)).minor == 7
    assert (await registry.create("y", None)).minor == 0
    with pytest.raises(TableError, match="minor exists") as caught:
        await registry.create("z", None, minor=7)
    assert caught.value.errno == errnos.EBUSY
    with pytest.raises(TableError, match="out of range"):
        await registry.create("z", None, minor=1 << 20)
    await registry.close()


async def test_a_forced_removal_does_not_wait_for_what_is_suspended_below() -> None:
    registry, _ = make_registry(a=8192)
    await registry.create("low", "0 16 linear /a 0")
    await registry.create("top", "0 16 linear /dev/mapper/low 0")
    await registry.suspend("low")
    await asyncio.wait_for(registry.remove("top", force=True), PATIENCE_S)
    assert [device.dm_name for device in registry.devices()] == ["low"]
    await registry.close()


async def test_registry_is_empty_when_the_last_device_is_removed() -> None:
    registry, _ = make_registry()
    await registry.until_empty()
    for name in "ab":
        await registry.create(name, "0 8 zero")
    empty = asyncio.create_task(registry.until_empty())
    await registry.remove("b")
    registry.rename("a", "c")
    await settle()
    assert not empty.done()
    await registry.remove("c")
    await asyncio.wait_for(empty, PATIENCE_S)
