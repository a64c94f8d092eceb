# SPDX-License-Identifier: Apache-2.0
"""`Shared`: what the connections of one listener share. `Host`: what requests ask of their connection."""

import asyncio
import socket
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from nbdtarget.common.access import AccessRules, Identity
from nbdtarget.common.clock import Clock
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.common.turns import Turns
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.export import DirectoryExports, ExportDirectory
from nbdtarget.server.gate import Gates
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.poller import Polling
from nbdtarget.server.refusals import Refusals
from nbdtarget.server.shares import Shares
from nbdtarget.server.traffic import Accounts

__all__ = ["Host", "Shared"]


@dataclass(slots=True)
class Shared:
    """The things that the connections of one listener share."""

    loop: asyncio.AbstractEventLoop
    clock: Clock
    limits: Limits
    budget: Budget
    shares: Shares
    pool: BufferPool
    directory: ExportDirectory
    gates: Gates
    turns: Turns
    polling: Polling
    starved: Callable[[], None]  # a connection waits for the budget
    closed: Callable[[Any], None]  # a connection has released everything
    hang_up_events: Callable[
        [socket.socket | TlsSocket], int
    ]  # see nbdtarget.server.peer
    rules: AccessRules  # who may attach to what
    accounts: Accounts
    refusals: Refusals

    def exports_of(
        self, client: Identity | None, peer: str, *, asks_for_certificates: bool
    ) -> DirectoryExports:
        """Return the exports that a client may attach; see `DirectoryExports`."""
        return DirectoryExports(
            self.directory,
            payload_max=self.limits.payload_max,
            rules=self.rules,
            client=client,
            peer=peer,
            why_full=self.shares.why_full,
            asks_for_certificates=asks_for_certificates,
            refused=self.refusals.note,
        )


class Host(Protocol):
    """The methods of a connection that its requests call."""

    peer: str
    is_frozen: bool  # for a hand-over to another process

    @property
    def may_stand_still(self) -> bool:
        """Whether requests in slices may stand still now, so that another process goes on with them."""

    @property
    def is_closed(self) -> bool: ...

    def has_hung_up(self) -> bool:
        """Whether the client has gone, so that no reply can be sent any more."""

    def flush(self) -> None:
        """Send now. Raises: OSError."""

    def flush_soon(self) -> None:
        """Send in this turn of the loop."""

    def disc(self) -> None:
        """The client wants to leave when everything is answered."""

    def reads_ended(self) -> None:
        """Reads have ended that were in flight without a bio, and their replies have left or are queued."""

    def maybe_release(self) -> None:
        """Called after each end of a request on a closed connection: release everything after the last one."""
