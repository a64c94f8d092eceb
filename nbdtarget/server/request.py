# SPDX-License-Identifier: Apache-2.0
"""`Request`: what is needed to answer a request that did not take the fast path, and to give back what it holds."""

from typing import Final, NamedTuple

from nbdtarget.server.buffers import Buffer
from nbdtarget_protocol.consts import CMD_TRIM, CMD_WRITE, CMD_WRITE_ZEROES

__all__ = ["WRITING", "Request", "Violation"]

WRITING: Final = frozenset({CMD_WRITE, CMD_TRIM, CMD_WRITE_ZEROES})


class Violation(Exception):
    """The client broke the protocol in a way that cannot be answered: the connection is closed."""


class Request(NamedTuple):
    """The data for the reply to a bio that did not take the fast path (`bio.private`)."""

    cookie: int
    command: int
    flags: int
    offset: int  # as the client asked: targets change `bio.offset` on its way down
    charge: int  # bytes of budget
    buffer: Buffer | None  # pooled, holds the bio's payload
    # Of a READ that was looked through already: whether all of it is zeroes.
    zeroes: bool | None = None
    begun_ns: int = 0  # of `perf_counter_ns`
