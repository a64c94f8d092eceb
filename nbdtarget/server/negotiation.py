# SPDX-License-Identifier: Apache-2.0
"""`Negotiation`: the handshake of one connection, and who its client is.

A client is known by its address, or by its user on a unix socket, from the beginning. After STARTTLS the names in its certificate
join them. Which exports exist for the client follows from this (`Shared.exports_of`).

After STARTTLS the socket is a `TlsSocket`, which has the same methods. The handshake of TLS is part of this handshake, within the
same bounds of time. If it fails, the connection ends: no option is answered after it.
"""

import socket

from nbdtarget.common.access import Identity
from nbdtarget.common.tls_socket import TlsSocket
from nbdtarget.server.output import Output
from nbdtarget.server.shared import Shared
from nbdtarget.server.tls import ListenerTls
from nbdtarget_protocol.handshake import ServerHandshake

__all__ = ["Negotiation"]


class Negotiation:
    """See the module head.

    Attributes:
        handshake: its options and answers.
    """

    def __init__(
        self,
        shared: Shared,
        output: Output,
        peer: str,
        tls: ListenerTls,
        client: Identity | None,
    ) -> None:
        self._output = output
        self._tls_context = tls.context
        self._exports = shared.exports_of(
            client, peer, asks_for_certificates=tls.verifies_peer
        )
        self.handshake = ServerHandshake(
            self._exports,
            output_max=shared.limits.handshake_output_max,
            tls=tls.mode,
        )

    @property
    def identity(self) -> Identity:
        """Who the client has shown to be."""
        return self._exports.client

    def begin_tls(self, sock: socket.socket) -> TlsSocket:
        """Return what encrypts `sock`: the answer to STARTTLS has left. All that follows is sent through it."""
        assert self._tls_context is not None
        tls = TlsSocket(sock, self._tls_context, server_side=True)
        self._output.use(tls)
        return tls

    def tls_has_begun(self, tls: TlsSocket) -> None:
        """The handshake of TLS is over: the client has the names that its certificate shows."""
        self.handshake.tls_started()
        self._exports.encrypted(tls.version, tls.peer_names())
