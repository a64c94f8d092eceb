# SPDX-License-Identifier: Apache-2.0
"""Exceptions for mistakes of the peer.

    ProtocolError
     +- HandshakeError      the handshake cannot go on, or cannot be answered: close the connection
     +- OptionError         an option is refused: REP_ERR_* reply, the handshake goes on
     +- RequestError        a request is refused: error reply, the connection goes on
     +- ReplyError          client side: the server broke the protocol; close the connection

A mistake of the caller is an AssertionError. Each `str()` is one line.
"""

from nbdtarget_protocol.consts import ERROR_NAMES, REP_NAMES

__all__ = [
    "HandshakeError",
    "OptionError",
    "ProtocolError",
    "ReplyError",
    "RequestError",
]


class ProtocolError(Exception):
    """Base of all exceptions for mistakes of the peer."""


class HandshakeError(ProtocolError):
    """The handshake cannot go on: the caller sends what is queued and closes."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message


class OptionError(ProtocolError):
    """An option is refused with `rep`, one of REP_ERR_*."""

    def __init__(self, rep: int, message: str) -> None:
        super().__init__(rep, message)
        self.rep = rep
        self.message = message

    def __str__(self) -> str:
        return f"{REP_NAMES.get(self.rep, hex(self.rep))}: {self.message}"


class RequestError(ProtocolError):
    """A request is refused with `errno`, one of the wire's eight."""

    def __init__(self, errno: int, message: str) -> None:
        super().__init__(errno, message)
        self.errno = errno
        self.message = message

    def __str__(self) -> str:
        return f"{ERROR_NAMES.get(self.errno, self.errno)}: {self.message}"


class ReplyError(ProtocolError):
    """The server's replies break the protocol: nothing after this can be trusted."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message

    def __str__(self) -> str:
        return self.message
