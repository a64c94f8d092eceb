# SPDX-License-Identifier: Apache-2.0
"""A disk as an object: each method is a verb, and what it returns has names."""

import asyncio
import errno as errnos
from collections.abc import AsyncIterator

import pytest

from nbdtarget.api.disk import DiskStatus, PowerCut, cut_words
from nbdtarget.api.nbd_client import NbdError
from nbdtarget.api.server import Server
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.control.status_fields import PowercutFields

KIB = 1024


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    async with Server() as server:
        yield server


async def test_power_cut_tells_what_was_at_risk_and_what_is_left(
    server: Server,
) -> None:
    disk = await server.create("d", "powercut", size="1M")
    with disk.connect() as client:
        client.write(0, b"k" * KIB)
        client.flush()
        client.write(0, b"l" * KIB)
        client.write(64 * KIB, b"l" * KIB)
        cut = await disk.power_cut()
        assert cut == PowerCut("drop", cut.seed, 2, 4, 0)
        assert client.read(0, KIB) == b"k" * KIB
        client.write(0, b"l" * KIB)
        cut = await disk.power_cut("keep")
        assert (cut.fate, cut.nr_sectors_left) == ("keep", 2)
        assert client.read(0, KIB) == b"l" * KIB


async def test_same_seed_leaves_the_same_disk(server: Server) -> None:
    left = []
    for name in ("a", "b"):
        disk = await server.create(name, "powercut", size="1M")
        with disk.connect() as client:
            client.write(0, b"t" * 64 * KIB)
            cut = await disk.power_cut(tear=7)
            assert (cut.fate, cut.seed) == ("tear", 7)
            left.append(client.read(0, 64 * KIB))
    assert left[0] == left[1]
    assert 0 < left[0].count(b"t") < 64 * KIB


async def test_power_stays_off_until_it_is_switched_on(server: Server) -> None:
    disk = await server.create("d", "powercut", size="1M")
    with disk.connect() as client:
        await disk.power_cut(mixed=0, stay_off=True)
        with pytest.raises(NbdError) as caught:
            client.read(0, 512)
        assert caught.value.errno == errnos.EIO
        await disk.power_on()
        assert client.read(0, 512) == bytes(512)
    with pytest.raises(TableError, match="the power is on"):
        await disk.power_on()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("drop", None, None), ("drop",)),
        (("keep", None, None), ("keep",)),
        (("mixed", None, None), ("mixed",)),
        (("drop", 0, None), ("tear", "0")),
        (("tear", 7, None), ("tear", "7")),
        (("drop", None, 3), ("mixed", "3")),
    ],
)
def test_words_of_a_cut(
    given: tuple[str, int | None, int | None], words: tuple[str, ...]
) -> None:
    assert cut_words(*given) == words


@pytest.mark.parametrize(
    "given",
    [("keep", 7, None), ("drop", 7, 8), ("mixed", 1, None), ("melt", None, None)],
)
def test_cut_with_two_fates_or_none_is_refused(
    given: tuple[str, int | None, int | None],
) -> None:
    with pytest.raises(NbdTargetError, match="fate"):
        cut_words(*given)


async def test_status_has_names_and_the_line_of_the_kernel(server: Server) -> None:
    disk = await server.create("d", "powercut", size="1M")
    status = await disk.status()
    assert (status.name, status.failure, status.losses) == ("d", "", 0)
    (target,) = status.targets
    assert (target.start, target.length, target.type) == (0, 2048, "powercut")
    assert target.line == "on 0 0 0"
    assert isinstance(status.fields, PowercutFields)
    assert status.fields.power_is_on
    assert [below.name for below in status.below] == ["memory:1048576"]


async def test_fields_are_only_there_if_one_target_has_some(server: Server) -> None:
    disk = await server.create("z", "zero", size="1M")
    with pytest.raises(NbdTargetError, match="the target zero has no fields"):
        _ = (await disk.status()).fields
    with pytest.raises(NbdTargetError, match="has 0 targets"):
        _ = DiskStatus("d", ()).fields


async def test_table_can_be_read_and_replaced(server: Server) -> None:
    disk = await server.create("d", "zero", size="1M")
    with disk.connect() as client:
        assert client.read(0, 512) == bytes(512)
        await disk.load("0 2048 error")
        assert await disk.table() == "0 2048 error"
        with pytest.raises(NbdError):
            client.read(0, 512)


async def test_refused_message_and_missing_disk_are_table_errors(
    server: Server,
) -> None:
    disk = await server.create("d", "powercut", size="1M")
    with pytest.raises(TableError, match="cycle") as caught:
        await disk.message("explode")
    assert caught.value.errno == errnos.EINVAL
    with pytest.raises(TableError, match="does not exist") as caught:
        await server.disk("nothing").status()
    assert caught.value.errno == errnos.ENXIO


async def test_suspended_disk_answers_when_it_is_resumed(server: Server) -> None:
    disk = await server.create("d", "linear", size="1M")
    with disk.connect() as client:
        await disk.suspend()
        assert (await disk.info()).state == "SUSPENDED"
        read = asyncio.create_task(asyncio.to_thread(client.read, 0, 512))
        await disk.resume()
        assert await read == bytes(512)
    assert (await disk.info()).size == 1 << 20


async def test_event_is_waited_for(server: Server) -> None:
    disk = await server.create("d", "powercut", size="1M")
    event_nr = (await disk.info()).event_nr
    waiting = asyncio.create_task(disk.wait(event_nr))
    await disk.power_cut()
    assert await waiting > event_nr


async def test_disk_in_use_is_removed_by_force_only(server: Server) -> None:
    disk = await server.create("d", "linear", size="1M")
    with disk.connect() as client:
        with pytest.raises(TableError) as caught:
            await disk.remove()
        assert caught.value.errno == errnos.EBUSY
        await disk.remove(force=True)
        with pytest.raises(NbdError):
            client.read(0, 512)
    event = await server.create("e", "linear", size="1M")
    await event.remove()
    assert "e" not in [each.name for each in await server.disks()]
