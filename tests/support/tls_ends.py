# SPDX-License-Identifier: Apache-2.0
"""The two ends of a connection in TLS, in one thread: compiled code carries the records of each, or Python."""

import socket
import ssl
from unittest import mock

from nbdtarget.common import tls_socket
from nbdtarget.common.tls_context import client_context, server_context
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.fast.compiled import TlsRecords, take_over
from tests.support.certificates import authority

__all__ = ["encrypted", "ends_before_the_handshake", "shake"]


def shake(
    serving: TlsSocket,
    asking: TlsSocket,
    *,
    server: bool = True,
    client: bool = True,
) -> None:
    """Carry out the handshake of two ends. Args: server, client: whether compiled code takes over there."""

    def chosen(
        end: ssl.SSLObject,
        fd: int,
        make_error: object,
        silent_max: int,
        answers_max: int,
    ) -> TlsRecords | None:
        is_wanted = server if end.server_side else client
        args = end, fd, make_error, silent_max, answers_max
        return take_over(*args) if is_wanted else None  # type: ignore[arg-type]

    with mock.patch.object(tls_socket, "_take_over", chosen):
        is_over = False
        while not is_over:
            is_over = asking.handshake() & serving.handshake()
    assert (serving.records is not None, asking.records is not None) == (server, client)


def ends_before_the_handshake(
    ours: socket.socket,
    peer: socket.socket,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> tuple[TlsSocket, TlsSocket]:
    """Return the server and the client. Args: ours, peer: of a socket pair; they do not block from now on."""
    pki = str(authority()[1])
    ours.setblocking(False)
    peer.setblocking(False)
    serving, asking = server_context(pki), client_context(pki)
    serving.maximum_version = version
    return (
        TlsSocket(ours, serving, server_side=True),
        TlsSocket(peer, asking, server_side=False, server_hostname="localhost"),
    )


def encrypted(
    ours: socket.socket,
    peer: socket.socket,
    *,
    server: bool = True,
    client: bool = True,
    version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3,
) -> tuple[TlsSocket, TlsSocket]:
    """As `ends_before_the_handshake`, behind it. Args: server, client: whether compiled code carries the records there."""
    ends = ends_before_the_handshake(ours, peer, version)
    shake(*ends, server=server, client=client)
    return ends
