# SPDX-License-Identifier: Apache-2.0
"""`Container`: the file that an image is, on a web server or in an object store, as a disk that our helper reads from us.

Theory of operation. qemu-nbd knows the formats of images. It knows neither what has to be pinned at a web server, nor how to ask again for hours, nor any
object store: its own reader gives up after five seconds, and a guest then loses its disk. So for these images the file is opened by
ourselves, as any remote image (`nbdtarget.devices.ranged`), and served over NBD to the helper alone:

    client  ->  clone  ->  HelperDevice  ->  qemu-nbd  ->  Container  ->  RangedDevice  ->  the web server

The helper gets a descriptor of the socket, which has no name (`PrivateSocket`), and connects through it. Nothing else can.

Only what QEMU's client needs is spoken: the handshake of the protocol package, READ, and nothing that writes. READs are
answered when their data is there, in any order, at most `READS_MAX` at a time; further ones wait in the socket.
"""

import asyncio
import contextlib
import fcntl
import os
from typing import Final

from nbdtarget.common.errors import DeviceError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.helper.process import PrivateSocket
from nbdtarget_protocol import consts
from nbdtarget_protocol.handshake import ExportInfo, ServerHandshake
from nbdtarget_protocol.replies import Replies, replies_of
from nbdtarget_protocol.transmission import ServerTransmission

__all__ = ["Container"]

READS_MAX: Final = 64
READ_BYTES_MAX: Final = 32 << 20
RECEIVE_BYTES: Final = 64 << 10
FD_MIN: Final = 10  # the first ones have a meaning in the helper


class Container:
    """See the module head.

    Attributes:
        device: that is served; it is closed with this.
        fd: the descriptor that the helper has to get.
        path: of the socket, as the helper calls it.
    """

    def __init__(self, device: Device) -> None:
        """Raises: OSError; then the device is still open."""
        self.device = device
        self._socket = PrivateSocket()
        try:
            fd = os.open(self._socket.path, os.O_PATH | os.O_CLOEXEC)
            self.fd = fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, FD_MIN)
            os.close(fd)
        except OSError:
            self._socket.close()
            raise
        self.path = f"/proc/self/fd/{self.fd}"
        self._server: asyncio.Server | None = None
        self._clients = Tasks()

    async def start(self) -> None:
        """Begin to serve."""
        self._server = await asyncio.start_unix_server(
            self._accepted, sock=self._socket.listener
        )

    async def close(self) -> None:
        """End the connections, and close the device. The helper has ended before."""
        if self._server is not None:
            self._server.close()
        await self._clients.cancel()
        self._socket.close()
        os.close(self.fd)
        await self.device.close()

    def _accepted(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._clients.start(_Client(self.device, reader, writer).serve())


class _Client:
    """One connection of the helper."""

    def __init__(
        self, device: Device, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._device = device
        self._reader = reader
        self._writer = writer
        self._reads = Tasks()
        self._room = asyncio.Semaphore(READS_MAX)

    async def serve(self) -> None:
        try:
            # A helper that was killed has just gone.
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                await self._converse()
        finally:
            await self._reads.cancel()
            self._writer.close()

    async def _converse(self) -> None:
        handshake = ServerHandshake(_Exports(self._device))
        while handshake.negotiated is None:
            self._writer.writelines(handshake.data_to_send())
            data = await self._reader.read(RECEIVE_BYTES)
            if handshake.closed or not data:
                return
            handshake.receive_data(data)
        self._writer.writelines(handshake.data_to_send())
        limits = ServerTransmission(handshake.negotiated, payload_max=READ_BYTES_MAX)
        replies = replies_of(handshake.negotiated)
        # QEMU waits for the answer to GO, so nothing came behind it.
        assert not handshake.trailing_data()
        layout = replies.request
        while True:
            request = layout.unpack(await self._reader.readexactly(layout.size))
            magic, flags, command, cookie, at, length = request
            if magic != replies.request_magic or command == consts.CMD_DISC:
                return
            if command == consts.CMD_WRITE:
                return  # it is read-only, and the helper has been told so
            error = limits.validate(command, flags, at, length)
            if error:
                self._writer.write(replies.error(cookie, at, error, ""))
            elif command != consts.CMD_READ:
                self._writer.write(replies.done(command, cookie, at))
            else:
                await self._room.acquire()
                self._reads.start(self._read(replies, cookie, at, length))

    async def _read(self, replies: Replies, cookie: int, at: int, length: int) -> None:
        try:
            data = await self._device.read(at, length)
        except DeviceError as error:
            reply = replies.error(cookie, at, consts.EIO, str(error))
            self._writer.write(reply)
        else:
            self._writer.write(replies.data(cookie, at, length))
            self._writer.write(data)
            with contextlib.suppress(OSError):  # its reader notices, too
                await self._writer.drain()
        finally:
            self._room.release()


class _Exports:
    """The device as the only export, with an empty name."""

    def __init__(self, device: Device) -> None:
        flags = consts.FLAG_READ_ONLY | consts.FLAG_CAN_MULTI_CONN
        # Not the size that is rounded up: some formats look for their footer from the end.
        self._info = ExportInfo("", device.exact_size, flags, contexts=())

    def lookup(self, name: str) -> ExportInfo | None:
        return self._info if not name else None

    def names(self) -> list[tuple[str, str]]:
        return [("", "")]
