# SPDX-License-Identifier: Apache-2.0
"""All connections of one `NbdDevice`: as many as the server takes, and none before the old ones have ended."""

import errno as errnos
import logging
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.nbd.connection import NbdConnection, connect, wait_until_ended
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_protocol import consts
from nbdtarget_protocol.client import ClientNegotiated

__all__ = ["AnotherDisk", "check_again", "check_same", "connect_all", "usable_size"]

log = logging.getLogger(__name__)

CHECK_S_MAX: Final = 3.0
# A server that serves one client at a time lets the others wait, or hangs up. It will take us when the connections that we have are closed.
_MAY_BE_FULL: Final = (errnos.ECONNRESET, errnos.EPIPE, errnos.ETIMEDOUT)


class AnotherDisk(ResolveError):
    """The server is back, and has another disk."""


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


def usable_size(negotiated: ClientNegotiated) -> int:
    """Return the bytes of the disk that can be read and written."""
    # proto.md: what lies past the last whole block cannot be reached.
    return negotiated.size // negotiated.block_size_min * negotiated.block_size_min


def check_same(
    name: str, size: int, before: ClientNegotiated, after: ClientNegotiated
) -> None:
    """Compare what a server tells with what it told before. Raises: AnotherDisk.

    Args: size: that the disk has here.
    """
    for what, old, new in (
        ("size", size, usable_size(after)),
        ("minimum block size", before.block_size_min, after.block_size_min),
        ("maximum payload", before.payload_max, after.payload_max),
    ):
        if old != new:
            reason = f"is another disk now: its {what} is {new} bytes, not {old}"
            raise AnotherDisk(name, reason)


async def check_again(
    name: str, uri: NbdUri, size: int, before: ClientNegotiated, *, read_only: bool
) -> None:
    """Look whether the server would take one more connection to the same disk: see `Device.check_again`."""
    try:
        async with timeout(CHECK_S_MAX):
            connection = await connect(name, uri)
    except TimeoutError:
        return
    except ResolveError as error:
        if error.errno in _MAY_BE_FULL:
            log.info("%s: it is not known whether it can be opened again", error)
            return
        raise
    try:
        _check(name, connection.negotiated, read_only=read_only)
        check_same(name, size, before, connection.negotiated)
    finally:
        connection.close()
