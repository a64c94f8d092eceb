# SPDX-License-Identifier: Apache-2.0
"""All connections of one `NbdDevice`: as many as the server takes, and none before the old ones have ended."""

import errno as errnos
import logging

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.nbd.connection import NbdConnection, connect, wait_until_ended
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_protocol import consts
from nbdtarget_protocol.client import ClientNegotiated

__all__ = ["connect_all"]

log = logging.getLogger(__name__)


async def connect_all(
    name: str, uri: NbdUri, *, read_only: bool
) -> list[NbdConnection]:
    """Connect as often as the server takes it. Raises: ResolveError."""
    if not read_only:
        await wait_until_ended(name, uri)
    connections = [await connect(name, uri)]
    try:
        negotiated = connections[0].negotiated
        _check(name, negotiated, read_only=read_only)
        if negotiated.flags & consts.FLAG_CAN_MULTI_CONN:
            await _connect_more(name, uri, connections)
    except BaseException:
        for connection in connections:
            connection.close()
        raise
    return connections


async def _connect_more(
    name: str, uri: NbdUri, connections: list[NbdConnection]
) -> None:
    """Add connections; one that cannot be had is only a loss of speed."""
    while len(connections) < uri.connections:
        try:
            another = await connect(name, uri)
        except ResolveError as error:
            log.info("%s; %d connections are used", error, len(connections))
            return
        if another.negotiated != connections[0].negotiated:
            another.close()
            log.info(
                "%s: its connections offer different things: only one is used", name
            )
            return
        connections.append(another)


def _check(name: str, negotiated: ClientNegotiated, *, read_only: bool) -> None:
    if negotiated.size < max(negotiated.block_size_min, 1):
        raise ResolveError(name, "is empty")
    if read_only:
        return
    if negotiated.flags & consts.FLAG_READ_ONLY:
        raise ResolveError(name, "the server exports it read-only", errnos.EROFS)
    if not negotiated.flags & consts.FLAG_SEND_FLUSH:
        reason = "the server has no FLUSH: nothing written there would be durable"
        raise ResolveError(name, reason)
