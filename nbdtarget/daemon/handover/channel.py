# SPDX-License-Identifier: Apache-2.0
"""`Channel`: messages and descriptors between the two processes, over one unix stream socket.

    8 bytes     length of the message, number of descriptors; both 32 bits, most significant byte first
    the bytes   of the message: one of `messages.py`, as MessagePack
    1 byte      for each FDS_AT_ONCE descriptors, with those descriptors (SCM_RIGHTS)

Waiting is done in a thread, so that the loop goes on with what is in flight.
"""

import asyncio
import errno as errnos
import socket
import struct
from collections.abc import Sequence
from typing import Final

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon.handover.messages import Failed, Message

__all__ = ["Channel", "ChannelError", "EndedError"]

FDS_AT_ONCE: Final = 250  # the kernel takes 253
FDS_MAX: Final = 1 << 16
MESSAGE_MAX: Final = 1 << 30
_HEAD: Final = struct.Struct(">II")
_FD: Final = struct.Struct("i")

_decode: Final = msgspec.msgpack.Decoder(Message).decode
_encode: Final = msgspec.msgpack.Encoder().encode


class ChannelError(NbdTargetError):
    """The other process has gone, does not answer, has refused, or says what this one does not understand.

    Attributes:
        has_ended: it has gone.
        errno: what the command `upgrade` is answered with.
    """

    has_ended = False
    errno = errnos.ECANCELED


class EndedError(ChannelError):
    """The other process has gone."""

    has_ended = True


class Channel:
    """One end. Used by one task at a time."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock

    async def send(self, message: Message, fds: Sequence[int] = ()) -> None:
        """Raises: ChannelError."""
        try:
            await asyncio.to_thread(self._send, _encode(message), fds)
        except OSError as error:
            raise EndedError(f"the other process: {error.strerror or error}") from None

    def send_now(self, message: Message) -> None:
        """As `send`, for a short message, and without a wait in which the caller could be cancelled. Raises: ChannelError."""
        try:
            self._send(_encode(message), ())
        except OSError as error:
            raise EndedError(f"the other process: {error.strerror or error}") from None

    async def receive(self, within_s: float | None) -> tuple[Message, list[int]]:
        """Return a message and its descriptors, which are the caller's.

        Raises: ChannelError: also when the other process has failed, with its reason.
        """
        try:
            raw, fds = await asyncio.to_thread(self._receive, within_s)
            message = _decode(raw)
        except TimeoutError:
            raise ChannelError(
                f"the other process does not answer for {within_s:g} s"
            ) from None
        except EOFError:
            raise EndedError("the other process has ended") from None
        except OSError as error:
            raise EndedError(f"the other process: {error.strerror or error}") from None
        except msgspec.MsgspecError as error:
            raise ChannelError(
                f"the other process says what this version does not understand: {error}"
            ) from None
        if isinstance(message, Failed):
            raise ChannelError(message.reason)
        return message, fds

    def close(self) -> None:
        self._sock.close()

    def _send(self, raw: bytes, fds: Sequence[int]) -> None:
        self._sock.settimeout(None)
        self._sock.sendall(_HEAD.pack(len(raw), len(fds)) + raw)
        for at in range(0, len(fds), FDS_AT_ONCE):
            socket.send_fds(self._sock, [b"\0"], list(fds[at : at + FDS_AT_ONCE]))

    def _receive(self, within_s: float | None) -> tuple[bytes, list[int]]:
        self._sock.settimeout(within_s)
        length, nr_fds = _HEAD.unpack(self._exactly(_HEAD.size))
        if length > MESSAGE_MAX or nr_fds > FDS_MAX:
            raise EOFError
        raw = self._exactly(length)
        fds: list[int] = []
        while len(fds) < nr_fds:
            # Not `socket.recv_fds`, which leaves out the flags.
            data, extra, _, _ = self._sock.recvmsg(
                1, socket.CMSG_LEN(FDS_AT_ONCE * _FD.size), socket.MSG_CMSG_CLOEXEC
            )
            more = [fd for _, _, raw_fds in extra for (fd,) in _FD.iter_unpack(raw_fds)]
            fds += more
            if not data or not more:
                raise EOFError
        return raw, fds

    def _exactly(self, nr_bytes: int) -> bytes:
        data = bytearray()
        while len(data) < nr_bytes:
            piece = self._sock.recv(min(nr_bytes - len(data), 1 << 20))
            if not piece:
                raise EOFError
            data += piece
        return bytes(data)
