# SPDX-License-Identifier: Apache-2.0
"""The memory of a connection that has closed is given back at once, without the garbage collector."""

import asyncio
import gc
import weakref
from collections.abc import Iterator

import pytest

from nbdtarget_protocol import consts as c
from tests.support.patience import until
from tests.support.peer import Served


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # `get_objects` shows only what a test has made
    gc.disable()
    yield
    gc.enable()  # what is frozen stays so: else each collection from here on looks at all modules and tests


async def _parts(served: Served) -> dict[str, "weakref.ref[object]"]:
    """Weak references to the parts of the only connection that have some."""
    listener = await served.start()
    (connection,) = listener._connections
    requests = connection._requests
    assert requests is not None
    return {
        "Connection": weakref.ref(connection),
        "Requests": weakref.ref(requests),
        "ServerHandshake": weakref.ref(connection._negotiation.handshake),
    }


def _alive(parts: dict[str, "weakref.ref[object]"]) -> list[str]:
    return [name for name, part in parts.items() if part() is not None]


def _left_over(*names: str) -> list[str]:
    """The objects of these classes that still exist, also those without weak references."""
    return [
        type(each).__name__
        for each in gc.get_objects()
        if type(each).__module__.startswith("nbdtarget.server.")
        and type(each).__name__ in names
    ]


async def _use_everything(served: Served) -> None:
    """Requests of each path, one of which ends late."""
    peer = await served.attach(structured=True, contexts=True)
    assert not (await peer.ask(c.CMD_READ, 0, 4096)).error
    assert not (await peer.ask(c.CMD_WRITE, payload=b"x" * 4096)).error
    assert not (await peer.ask(c.CMD_READ, 0, 100_000)).error
    assert not (await peer.ask(c.CMD_WRITE, payload=b"x" * 100_000)).error
    assert not (await peer.ask(c.CMD_FLUSH)).error
    assert not (await peer.ask(c.CMD_BLOCK_STATUS, 0, 4096)).error
    assert (await peer.ask(c.CMD_READ, 1 << 40, 1)).error
    served.disk.hold = True
    peer.send(c.CMD_WRITE, payload=b"x" * 4096)
    await served.disk.until_held(1)
    served.disk.hold = False
    served.disk.let_go()
    assert not (await peer.reply()).error


@pytest.mark.parametrize("end", ["disc", "close", "garbage", "reset in a payload"])
async def test_nothing_of_a_closed_connection_is_left(served: Served, end: str) -> None:
    await _use_everything(served)
    parts = await _parts(served)
    peer = served.peers[0]
    if end == "disc":
        peer.send(c.CMD_DISC)
    elif end == "garbage":
        peer.writer.write(b"\xff" * 28)
    elif end == "reset in a payload":
        peer.writer.write(peer.request(c.CMD_WRITE, 0, 200_000) + bytes(100_000))
        await asyncio.sleep(0.05)
        peer.close()
    else:
        peer.close()
    await served.until_connections(0)
    await until(lambda: not _alive(parts))
    assert not _left_over("Input", "Output", "Flow", "Poller", "LargeWrite")


async def test_nothing_is_left_when_the_last_bio_ends_after_the_close(
    served: Served,
) -> None:
    peer = await served.attach()
    parts = await _parts(served)
    served.disk.hold = True
    peer.send(c.CMD_READ, 0, 4096)
    peer.send(c.CMD_WRITE, payload=b"x" * 100_000)
    await served.disk.until_held(2)
    peer.close()
    await asyncio.sleep(0.05)
    assert _alive(parts)
    served.disk.hold = False
    served.disk.let_go()
    await served.until_connections(0)
    await until(lambda: not _alive(parts))
    assert not _left_over("Input", "Output", "Flow", "Poller", "LargeWrite")


async def test_nothing_is_left_of_a_client_that_only_greets(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    listener = await served.start()
    await until(lambda: listener.nr_connections == 1)
    (connection,) = listener._connections
    parts: dict[str, weakref.ref[object]] = {"Connection": weakref.ref(connection)}
    del connection
    peer.close()
    await served.until_connections(0)
    await until(lambda: not _alive(parts))
    assert not _left_over("Output", "Flow")
