# SPDX-License-Identifier: Apache-2.0
"""Each bound of the server has a name, a default, a key, an entry in the reference and a metric; and each time it is met counts."""

import asyncio
import re
from collections.abc import Awaitable, Callable
from dataclasses import fields, replace

import pytest

from nbdtarget.config.file import parse
from nbdtarget.server.bounds import BOUNDS, INNER, UNCOUNTED, BoundsMet
from nbdtarget.server.limits import Limits
from nbdtarget_protocol import consts as c
from tests.support.clock import SimClock
from tests.support.patience import PATIENCE_S, until
from tests.support.peer import MIB, Peer, Served
from tests.support.places import ROOT

DEFAULTS = {each.name: each.default for each in fields(Limits)}
REFERENCE = (ROOT / "docs/reference/configuration.md").read_text()
BIG = 256 << 10


def test_each_limit_is_a_bound_or_an_inner_matter() -> None:
    assert sorted((*BOUNDS, *INNER)) == sorted(DEFAULTS)


@pytest.mark.parametrize("name", BOUNDS)
def test_bound_is_a_key_of_the_configuration_file(name: str) -> None:
    config = parse(f"[limits]\n{name} = {DEFAULTS[name]}\n", "disks.toml", {})
    assert getattr(config.limits, name) == DEFAULTS[name]


@pytest.mark.parametrize("name", BOUNDS)
def test_bound_has_an_entry_in_the_reference_that_tells_its_default(name: str) -> None:
    section = REFERENCE.partition("## Keys of limits")[2]
    entry = re.search(rf"(?m)^`(?:.*`)?{name}`.*\n: (.*)$", section)
    assert entry is not None, "docs/reference/configuration.md, Keys of limits"
    assert f"{DEFAULTS[name]:.12g}" in entry[1].partition("Default:")[2]


def test_all_but_those_of_the_kernel_are_counted() -> None:
    assert BoundsMet().counts == dict.fromkeys(set(BOUNDS) - set(UNCOUNTED), 0)


# ---- what meets each of them ----


async def counts_of(served: Served) -> dict[str, int]:
    budget = (await served.start()).budget
    assert budget is not None
    return budget.bounds_met.counts


async def ended(peer: Peer) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await peer.at_end()


async def one_connection_too_many(served: Served) -> None:
    await served.attach()
    await ended(await served.connect())


async def one_client_of_the_export_too_many(served: Served) -> None:
    await served.attach()
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_GO, bytes(6))
    assert (await peer.option_reply())[0] & c.REP_FLAG_ERROR


async def one_handshake_too_many(served: Served) -> None:
    first = await served.connect()
    await first.greet()
    await served.connect()
    await ended(first)


async def no_option(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    assert isinstance(served.clock, SimClock)
    served.clock.advance(10)
    await ended(peer)


async def options_for_ever(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    assert isinstance(served.clock, SimClock)
    for _ in range(12):
        peer.option(c.OPT_INFO, bytes(6))
        while (await peer.option_reply())[0] != c.REP_ACK:
            pass
        served.clock.advance(10)
    await ended(peer)


async def lists_for_ever(served: Served) -> None:
    peer = await served.connect()
    await peer.greet()
    peer.writer.write(c.OPTION.pack(c.IHAVEOPT, c.OPT_LIST, 0) * 100)
    await until(lambda: not served.listener or not served.listener.nr_connections)


async def replies_are_not_taken(served: Served) -> Peer:
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a stream's transport can
    for _ in range(64):
        peer.send(c.CMD_READ, 0, BIG)
    (connection,) = (await served.start())._connections
    await until(lambda: connection._output.is_full)
    return peer


async def replies_wait(served: Served) -> None:
    peer = await replies_are_not_taken(served)
    peer.send(c.CMD_READ, 0, BIG)  # which has to wait
    counts = await counts_of(served)
    await until(lambda: counts["send_buffer_max"] > 0)
    peer.writer.transport.abort()


async def replies_are_never_taken(served: Served) -> None:
    peer = await replies_are_not_taken(served)
    assert isinstance(served.clock, SimClock)
    for _ in range(8):
        served.clock.advance(served.limits.stall_total_s / 4)
    await served.until_connections(0)
    peer.writer.transport.abort()


async def says_disc_and_takes_nothing(served: Served) -> None:
    peer = await served.attach()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # as above
    for _ in range(4):
        peer.send(c.CMD_READ, 0, MIB)
    peer.send(c.CMD_DISC)
    (connection,) = (await served.start())._connections
    await until(lambda: connection._output.is_blocked and connection.has_said_disc())
    assert isinstance(served.clock, SimClock)
    for _ in range(3):
        served.clock.advance(served.limits.stall_timeout_s)
    await served.until_connections(0)
    peer.writer.transport.abort()


async def lingers(served: Served) -> None:
    peer = await served.attach()
    assert isinstance(served.clock, SimClock)
    closing = asyncio.create_task((await served.start()).close())
    await ended(peer)  # and its own half stays open
    served.clock.advance(served.limits.linger_s)
    await closing


async def many_requests(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    for _ in range(4):
        peer.send(c.CMD_READ, 0, 4096)
    await served.disk.until_held(2)
    listener = await served.start()
    await until(lambda: any(each._flow.is_paused for each in listener._connections))
    served.disk.hold = False
    served.disk.let_go()
    for _ in range(4):
        assert (await peer.reply()).error == 0


async def many_bytes(served: Served) -> None:
    served.disk.hold = True
    peer = await served.attach()
    for _ in range(4):
        peer.send(c.CMD_READ, 0, BIG)
    await served.disk.until_held(1)
    listener = await served.start()
    await until(lambda: any(each._flow.is_paused for each in listener._connections))
    served.disk.hold = False
    served.disk.let_go()
    for _ in range(4):
        assert (await peer.reply()).error == 0


async def two_clients_ask_for_more(served: Served, length: int, bound: str) -> None:
    served.disk.hold = True
    peers = [await served.attach(), await served.attach()]
    for peer in peers:
        for _ in range(2):
            peer.send(c.CMD_READ, 0, length)
    counts = await counts_of(served)
    await until(lambda: counts[bound] > 0)
    served.disk.hold = False
    served.disk.let_go()
    for peer in peers:
        for _ in range(2):
            assert (await peer.reply()).error == 0


async def many_requests_of_two(served: Served) -> None:
    await two_clients_ask_for_more(served, 4096, "requests_total_max")


async def many_bytes_of_two(served: Served) -> None:
    await two_clients_ask_for_more(served, BIG, "bytes_total_max")


async def one_connection_of_an_address_too_many(served: Served) -> None:
    (uri,) = await (await served.start()).start("tcp:127.0.0.1:0")
    port = int(re.findall(r":(\d+)/", uri)[0])
    for is_refused in (False, True):
        peer = Peer(*await asyncio.open_connection("127.0.0.1", port))
        served.peers.append(peer)
        await (ended(peer) if is_refused else peer.attach())


async def a_payload_too_long(served: Served) -> None:
    peer = await served.attach()
    assert (await peer.ask(c.CMD_READ, 0, (64 << 10) + 512)).error == c.EINVAL
    assert (await peer.ask(c.CMD_WRITE, 0, payload=bytes(70_000))).error == c.EINVAL


Meets = Callable[[Served], Awaitable[None]]
CASES: dict[str, tuple[dict[str, float], Meets, int]] = {
    "connections_max": ({"connections_max": 1}, one_connection_too_many, 1),
    "export_connections_max": (
        {"export_connections_max": 1},
        one_client_of_the_export_too_many,
        1,
    ),
    "handshakes_max": ({"handshakes_max": 1}, one_handshake_too_many, 1),
    "handshake_timeout_s": ({}, no_option, 1),
    "handshake_total_s": ({}, options_for_ever, 1),
    "handshake_output_max": ({"handshake_output_max": 100}, lists_for_ever, 1),
    "stall_timeout_s": ({}, says_disc_and_takes_nothing, 1),
    "stall_total_s": ({"stall_total_s": 20.0}, replies_are_never_taken, 1),
    "linger_s": ({}, lingers, 1),
    "requests_in_flight_max": ({"requests_in_flight_max": 2}, many_requests, 1),
    "bytes_in_flight_max": ({"bytes_in_flight_max": 2 * BIG}, many_bytes, 1),
    "export_requests_max": ({"export_requests_max": 2}, many_requests, 1),
    "export_bytes_max": ({"export_bytes_max": 3 * BIG}, many_bytes, 1),
    "peer_connections_max": (
        {"peer_connections_max": 1},
        one_connection_of_an_address_too_many,
        1,
    ),
    "requests_total_max": (
        {"requests_total_max": 3, "requests_in_flight_max": 2},
        many_requests_of_two,
        1,
    ),
    "bytes_total_max": (
        {"bytes_total_max": 4 * BIG, "payload_max": BIG},
        many_bytes_of_two,
        1,
    ),
    "send_buffer_max": ({"send_buffer_max": BIG}, replies_wait, 1),
    "payload_max": ({"payload_max": 64 << 10}, a_payload_too_long, 2),
}


def test_each_bound_has_a_case() -> None:
    assert set(CASES) == set(BOUNDS) - set(UNCOUNTED)


@pytest.mark.parametrize("name", CASES)
async def test_bound_that_is_met_counts(name: str, served: Served) -> None:
    changed, meet, least = CASES[name]
    served.limits = replace(served.limits, **changed)  # type: ignore[arg-type]  # of either type
    if name.endswith("_s") or name == "handshakes_max":
        # Nothing else ends a client meanwhile: time stands still.
        served.clock = SimClock()
    await meet(served)
    assert (await counts_of(served))[name] >= least


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        # The first request of an export may begin although it is longer than the bound. Then the room for the second one is negative.
        ({"export_bytes_max": BIG // 2}, "export_bytes_max"),
        ({"export_bytes_max": 2 * BIG - 1}, "export_bytes_max"),
        ({"bytes_in_flight_max": BIG // 2}, "bytes_in_flight_max"),
        ({"bytes_total_max": BIG, "payload_max": BIG}, "bytes_total_max"),
    ],
    ids=["export, at once", "export", "connection", "all"],
)
async def test_bound_that_counts_is_the_one_that_leaves_no_room(
    served: Served, changed: dict[str, int], expected: str
) -> None:
    served.limits = replace(served.limits, **changed)  # type: ignore[arg-type]  # as above
    await many_bytes(served)
    counts = await counts_of(served)
    assert [name for name, nr in counts.items() if nr] == [expected]


async def test_what_is_used_of_each_bound(served: Served) -> None:
    listener = await served.start()
    assert set(listener.used().values()) <= {0}
    served.disk.hold = True
    first, second = await served.attach(), await served.attach()
    await (await served.connect()).greet()
    for _ in range(3):
        first.send(c.CMD_READ, 0, BIG)
    second.send(c.CMD_READ, 0, BIG)
    await served.disk.until_held(4)
    used = listener.used()
    for name in used:
        if "bytes" in name:
            used[name] -= used[name] % BIG  # of headers
    assert used == {
        "connections_max": 3,
        "peer_connections_max": 0,  # of unix sockets there is no address
        "export_connections_max": 2,
        "handshakes_max": 1,
        "requests_in_flight_max": 3,
        "bytes_in_flight_max": 3 * BIG,
        "export_requests_max": 4,
        "export_bytes_max": 4 * BIG,
        "requests_total_max": 4,
        "bytes_total_max": 4 * BIG,
        "send_buffer_max": 0,
    }
    served.disk.hold = False
    served.disk.let_go()
    for peer, nr in ((first, 3), (second, 1)):
        for _ in range(nr):
            assert (await peer.reply()).error == 0
