# SPDX-License-Identifier: Apache-2.0
"""Mutants of NBD's extended headers: long lengths, payloads of requests that are no WRITEs, and what replies refer to."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["EXTENDED"]

SERVED: Final = ("tests/nbdtarget/server/test_extended_headers.py",)
BYTES: Final = ("tests/protocol/test_extended.py",)

EXTENDED: Final = (
    Mutant(
        "long-length-cut-to-32-bits",
        "A discard of 16 TiB is acknowledged, and does a part of that.",
        "nbdtarget.server.requests:Requests._take",
        (
            (
                "        self._flow.spend(length)\n",
                "        length &= 0xFFFFFFFF\n        self._flow.spend(length)\n",
            ),
        ),
        SERVED,
    ),
    Mutant(
        "contexts-of-a-block-status-not-selected",
        "A BLOCK_STATUS whose payload selects a context is answered by all of them.",
        "nbdtarget_protocol.extended:decode_status_payload",
        (("    return length, selected\n", "    return length, tuple(contexts)\n"),),
        BYTES,
    ),
    Mutant(
        "payload-taken-for-requests",
        "Bytes that a client sends as the payload of a request are carried out as requests.",
        "nbdtarget.server.requests:Requests._has_payload",
        (
            (
                "self._replies.extended and flags & CMD_FLAG_PAYLOAD_LEN",
                "False and flags & CMD_FLAG_PAYLOAD_LEN",
            ),
        ),
        SERVED,
    ),
    Mutant(
        "reply-without-the-offset-of-its-request",
        "A client that compares the offset of a reply, as it should, disconnects.",
        "nbdtarget_protocol.extended:none_chunk",
        (("cookie, at, 0", "cookie, 0, 0"),),
        BYTES,
    ),
)
