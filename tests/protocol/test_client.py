# SPDX-License-Identifier: Apache-2.0
"""Our server against our client, in memory: what one says, the other understands."""

from dataclasses import replace
from typing import Any

import pytest

from nbdtarget_protocol.client import ClientHandshake, ClientTransmission, Completion
from nbdtarget_protocol.consts import (
    CMD_BLOCK_STATUS,
    CMD_FLAG_REQ_ONE,
    CMD_FLUSH,
    CMD_READ,
    CMD_TRIM,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    EINVAL,
    ENOSPC,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_SEND_DF,
)
from nbdtarget_protocol.handshake import ExportInfo, Negotiated, ServerHandshake
from nbdtarget_protocol.replies import replies_of
from nbdtarget_protocol.transmission import ServerTransmission, clip_extents
from tests.support.protocol_feed import ALL_FLAGS, DISK, MIB, OneExport, data_of


def shake_hands(
    name: str, export: ExportInfo = DISK, **kwargs: Any
) -> tuple[ServerHandshake, ClientHandshake]:
    server = ServerHandshake(OneExport(export))
    client = ClientHandshake(name, **kwargs)
    while True:
        to_client = server.data_to_send()
        for data in to_client:
            client.receive_data(data)
        to_server = client.data_to_send()
        for data in to_server:
            server.receive_data(data)
        if not to_client and not to_server:
            return server, client


class Disk:
    """A server in memory: a buffer behind ServerTransmission, holes where it is zero."""

    def __init__(self, negotiated: Negotiated) -> None:
        self.transmission = ServerTransmission(negotiated)
        self.replies = replies_of(negotiated)
        self.content = bytearray(MIB)

    def serve(self, request: bytes, payload: bytes = b"") -> bytes:
        replies = self.replies
        _, flags, command, cookie, offset, length = replies.request.unpack(request)
        refusal = self.transmission.refusal(command, flags, offset, length)
        if refusal is not None:
            return replies.error(cookie, offset, refusal.errno, refusal.message)
        if command == CMD_READ and length:
            data = bytes(self.content[offset : offset + length])
            if replies.structured and not any(data):
                return replies.hole(cookie, offset, length)
            return replies.data(cookie, offset, length) + data
        if command == CMD_BLOCK_STATUS:
            req_one = bool(flags & CMD_FLAG_REQ_ONE)
            extents = clip_extents([(512, 0), (MIB, 3)], length, req_one=req_one)
            [(context_id, _)] = self.transmission.contexts
            return replies.block_status(cookie, offset, context_id, extents, done=True)
        if command == CMD_WRITE:
            self.content[offset : offset + length] = payload
        elif command == CMD_WRITE_ZEROES:
            self.content[offset : offset + length] = bytes(length)
        return replies.done(command, cookie, offset)


class Pair:
    """A Disk and a client of it."""

    def __init__(self, *, structured: bool, extended: bool = False) -> None:
        server, client = shake_hands(
            "disk", want_structured=structured, want_extended=extended
        )
        assert server.negotiated is not None
        assert client.negotiated is not None
        self.disk = Disk(server.negotiated)
        self.client = ClientTransmission(client.negotiated)

    def ask(
        self,
        command: int,
        offset: int,
        length: int,
        flags: int = 0,
        payload: bytes = b"",
    ) -> Completion:
        buffer = memoryview(bytearray(length)) if command == CMD_READ else None
        request = self.client.request(command, flags, 1, offset, length, buffer)
        [completion] = self.client.receive_data(self.disk.serve(request, payload))
        return completion


chunked = pytest.mark.parametrize("extended", [False, True])


@pytest.fixture(params=["simple", "structured", "extended"])
def pair(request: pytest.FixtureRequest) -> Pair:
    structured, extended = request.param != "simple", request.param == "extended"
    return Pair(structured=structured, extended=extended)


@pytest.mark.parametrize("name", ["disk", ""])
def test_both_sides_negotiate_the_same(name: str) -> None:
    server, client = shake_hands(name)
    assert server.negotiated is not None
    assert client.negotiated is not None
    flags = ALL_FLAGS | FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD
    assert client.negotiated.flags == server.negotiated.flags == flags
    assert client.negotiated.size == server.negotiated.export.size == DISK.size
    assert client.negotiated.contexts == server.negotiated.contexts
    assert client.negotiated.payload_max == DISK.payload_max
    assert client.negotiated.structured
    assert server.negotiated.structured


def test_client_gets_the_contexts_that_it_wants_and_no_other() -> None:
    offered = ("x-nbdtarget:hydration", "base:allocation", "x-y:z")
    export = replace(DISK, contexts=offered)
    for want, selected in (
        (("base:allocation",), ((2, "base:allocation"),)),
        (("x-y:z", "x-y:a", offered[0]), ((1, offered[0]), (3, "x-y:z"))),
    ):
        server, client = shake_hands("disk", export, want_contexts=want)
        assert server.negotiated is not None
        assert client.negotiated is not None
        assert client.negotiated.contexts == server.negotiated.contexts == selected


def test_unknown_export_ends_both_sides_politely() -> None:
    server, client = shake_hands("disc")
    assert str(client.error) == "server has no export 'disc': no export 'disc'"
    assert server.closed
    assert server.error is None


def test_write_comes_back(pair: Pair) -> None:
    assert pair.ask(CMD_WRITE, 4096, 512, payload=b"x" * 512).error == 0
    assert data_of(pair.ask(CMD_READ, 4096, 512)) == b"x" * 512
    assert pair.ask(CMD_WRITE_ZEROES, 4096, 256).error == 0
    assert data_of(pair.ask(CMD_READ, 4096, 512)) == bytes(256) + b"x" * 256
    assert data_of(pair.ask(CMD_READ, 0, 4096)) == bytes(4096)
    assert data_of(pair.ask(CMD_READ, 0, 0)) == b""


def test_refusals_arrive(pair: Pair) -> None:
    assert pair.ask(CMD_READ, MIB, 1).error == EINVAL
    assert pair.ask(CMD_WRITE, MIB, 1).error == ENOSPC
    assert pair.ask(CMD_TRIM, 0, MIB).error == 0
    assert pair.ask(CMD_FLUSH, 0, 0).error == 0


@chunked
def test_refusal_says_why_when_structured(extended: bool) -> None:
    completion = Pair(structured=True, extended=extended).ask(CMD_READ, MIB, 1)
    assert completion.message == "READ 1048576+1 past the end at 1048576"


@chunked
def test_block_status_arrives_when_structured(extended: bool) -> None:
    pair = Pair(structured=True, extended=extended)
    assert pair.ask(CMD_BLOCK_STATUS, 0, 4096).extents == [(512, 0), (3584, 3)]
    one = pair.ask(CMD_BLOCK_STATUS, 0, 4096, CMD_FLAG_REQ_ONE)
    assert one.extents == [(512, 0)]


def test_block_status_without_contexts_is_refused() -> None:
    assert Pair(structured=False).ask(CMD_BLOCK_STATUS, 0, 4096).error == EINVAL
