# SPDX-License-Identifier: Apache-2.0
"""The map of a device is what its metadata contexts say."""

import errno as errnos

import pytest

from nbdtarget.common.errors import TableError
from nbdtarget.monitor import device_map as module
from nbdtarget.monitor.device_map import device_map
from nbdtarget_protocol import consts as c
from tests.support.patience import attempts
from tests.support.served import AWKWARD, Served
from tests.support.site import BLOCK, SIZE

NR_BLOCKS = SIZE // BLOCK


async def test_what_of_a_clone_is_copied(served: Served) -> None:
    await served.clone.message(0, ["disable_hydration"])
    async for _ in attempts():
        answer = await device_map(served.clone, NR_BLOCKS)
        if not answer.totals[2]:  # the copies that were in flight have ended
            break
    assert answer.states == ("copied", "source", "copying")
    assert answer.cell_bytes == BLOCK
    assert len(answer.cells) == NR_BLOCKS
    assert answer.cells[0] == (255, 0, 0)  # a client has written it
    assert sum(answer.totals) == SIZE
    assert answer.totals[0] == BLOCK * sum(each == (255, 0, 0) for each in answer.cells)
    whole = await device_map(served.clone, 1)
    assert whole.totals == answer.totals
    assert not whole.is_sampled


async def test_what_of_a_disk_is_cached_and_dirty(served: Served) -> None:
    peer = await served.attach("k")
    await served.cache.message(0, ["warm", "2-4"])
    cached = (0, 255, 0)
    while (await device_map(served.cache, NR_BLOCKS)).cells[2:4] != (cached, cached):
        await peer.ask(c.CMD_FLUSH)
    await peer.ask(c.CMD_WRITE, 3 * BLOCK, payload=b"x" * 512)
    answer = await device_map(served.cache, NR_BLOCKS)
    assert answer.states == ("origin", "cached", "dirty")
    assert answer.cells[2] == (0, 255, 0)
    assert answer.cells[3] == (0, 0, 255)
    assert answer.cells[10] == (255, 0, 0)
    peer.close()


async def test_of_a_large_disk_each_cell_is_looked_at_in_part(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LOOK_BYTES", BLOCK)
    answer = await device_map(served.clone, 4)
    assert answer.is_sampled
    assert len(answer.cells) == 4
    assert answer.totals[0] >= SIZE // 4  # the first block stands for a quarter
    assert sum(answer.totals) == SIZE


async def test_cells_are_bounded(served: Served) -> None:
    assert len((await device_map(served.clone, 4096)).cells) == SIZE // 4096
    for nr_cells in (0, 4097):
        with pytest.raises(TableError, match="1 to 4096 cells"):
            await device_map(served.clone, nr_cells)


async def test_a_table_of_another_size_ends_the_map(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def swapped(_: float) -> None:
        monkeypatch.setattr(served.clone, "size", BLOCK)

    monkeypatch.setattr(module, "sleep", swapped)
    with pytest.raises(TableError, match="its table was replaced"):
        await device_map(served.clone, 8)


async def test_without_a_map(served: Served) -> None:
    for name in (AWKWARD, "failed"):
        with pytest.raises(TableError, match="neither a clone nor a cache"):
            await device_map(served.site.registry.get(name), 8)
    await served.site.registry.suspend("c")
    with pytest.raises(TableError) as caught:
        await device_map(served.clone, 8)
    assert caught.value.errno == errnos.EBUSY
    await served.site.registry.resume("c")
