# SPDX-License-Identifier: Apache-2.0
"""How a connection is answered: each way encodes what our own client takes."""

from dataclasses import replace

import pytest

from nbdtarget_protocol import consts as c
from nbdtarget_protocol.client import ClientNegotiated
from nbdtarget_protocol.handshake import Negotiated
from nbdtarget_protocol.replies import (
    ExtendedReplies,
    Replies,
    SimpleReplies,
    StructuredReplies,
    replies_of,
)
from tests.support.protocol_feed import (
    EXTENDED,
    SERVED,
    SERVED_EXTENDED,
    SERVED_SIMPLE,
    SIMPLE,
    STRUCTURED,
    Request,
    data_of,
    feed_replies,
)

DATA = bytes(range(256)) * 4
READ: Request = (c.CMD_READ, 0, 1, 4096, 1024)
STATUS: Request = (c.CMD_BLOCK_STATUS, 0, 3, 4096, 1024)
WAYS = [(SERVED_SIMPLE, SIMPLE), (SERVED, STRUCTURED), (SERVED_EXTENDED, EXTENDED)]
ways = pytest.mark.parametrize(("served", "negotiated"), WAYS)


@ways
def test_attributes_say_what_the_bytes_are(
    served: Negotiated, negotiated: ClientNegotiated
) -> None:
    replies = replies_of(served)
    assert (replies.structured, replies.extended) == (
        served.structured,
        served.extended,
    )
    assert len(replies.data(1, 4096, 1024)) == replies.read_header
    assert replies.request.size == (32 if served.extended else 28)
    assert (
        type(replies)
        is {
            (False, False): SimpleReplies,
            (True, False): StructuredReplies,
            (True, True): ExtendedReplies,
        }[served.structured, served.extended]
    )


@ways
@pytest.mark.parametrize("command", [c.CMD_READ, c.CMD_WRITE, c.CMD_FLUSH])
def test_done(served: Negotiated, negotiated: ClientNegotiated, command: int) -> None:
    length = 512 if command == c.CMD_WRITE else 0
    reply = replies_of(served).done(command, 9, 512)
    [done] = feed_replies(reply, (command, 0, 9, 512, length), negotiated=negotiated)
    assert done.error == 0


@ways
@pytest.mark.parametrize("request_", [READ, (c.CMD_TRIM, 0, 1, 4096, 1024)])
def test_error(
    served: Negotiated, negotiated: ClientNegotiated, request_: Request
) -> None:
    reply = replies_of(served).error(1, 4096, c.ENOSPC, "no room")
    [done] = feed_replies(reply, request_, negotiated=negotiated)
    assert done.error == c.ENOSPC
    assert done.message == ("no room" if served.structured else "")


@ways
def test_read(served: Negotiated, negotiated: ClientNegotiated) -> None:
    reply = replies_of(served).data(1, 4096, 1024) + DATA
    [done] = feed_replies(reply, READ, negotiated=negotiated)
    assert data_of(done) == DATA


@pytest.mark.parametrize(("served", "negotiated"), WAYS[1:])
def test_hole_and_status(served: Negotiated, negotiated: ClientNegotiated) -> None:
    replies: Replies = replies_of(served)
    [done] = feed_replies(replies.hole(1, 4096, 1024), READ, negotiated=negotiated)
    assert data_of(done) == bytes(1024)
    two = ((1, "base:allocation"), (2, "x-a:b"))
    reply = replies.block_status(3, 4096, 1, [(512, 3)], done=False)
    reply += replies.block_status(3, 4096, 2, [(1024, 0)], done=True)
    [done] = feed_replies(reply, STATUS, negotiated=replace(negotiated, contexts=two))
    assert done.extents == [(512, 3)]


def test_simple_replies_have_no_chunks() -> None:
    replies = SimpleReplies()
    with pytest.raises(AssertionError):
        replies.hole(1, 0, 1)
    with pytest.raises(AssertionError):
        replies.block_status(1, 0, 1, [(1, 0)], done=True)
    with pytest.raises(AssertionError):
        replies.part(1, 0, 0, 1, done=True)


@pytest.mark.parametrize(("served", "negotiated"), WAYS[1:])
def test_read_in_parts(served: Negotiated, negotiated: ClientNegotiated) -> None:
    replies = replies_of(served)
    at = 1, 4096
    reply = replies.part(*at, 4096, 1000, done=False) + DATA[:1000]
    reply += replies.part(*at, 5096, 24, done=True) + DATA[1000:]
    [completion] = feed_replies(reply, READ, negotiated=negotiated)
    assert data_of(completion) == DATA
