# SPDX-License-Identifier: Apache-2.0
"""An NBD server in memory, on another machine, whose disk ours stand on: it dies, hangs and comes back.

Theory of operation. A `Backend` serves one `SimDisk` over sockets of the life's network, with the
sans I/O handshake of `protocol`. Requests are carried out as they come, in the disk's time and in
any order. `nbd.connection._connected` is patched to come here (`connect_in_memory`), so what is
simulated is all of our NBD client: connections, their loss, reconnection, time limits.

    kill         the process dies: connections are reset, what is in flight has happened or not. What
                 had been carried out stays in the system's page cache
    power cut    as `kill`, and the disk loses what was not flushed, by a fate
    hang         nothing is answered and nothing is read until `go_on`
    come back    it listens again; by mistake perhaps with `another` disk under the same name

`Trouble` does these things to the backends of a life, at times drawn from its seed. What may fail meanwhile, and until
when, it tells the life: nothing, while a server only hangs for a while.
"""

import asyncio
import random
import socket
from typing import TYPE_CHECKING, Final, cast

from nbdtarget.bio import (
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.devices.nbd.device import open_nbd
from nbdtarget.devices.nbd.uri import NbdUri, parse_nbd_uri
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_protocol import consts
from nbdtarget_protocol.handshake import ExportInfo, ServerHandshake
from nbdtarget_protocol.replies import Replies, SimpleReplies, replies_of
from tests.sim.disks import SimDisk
from tests.sim.model import SECTOR
from tests.sim.rigs import BACKEND, Role
from tests.sim.sockets import SimNetwork, SimSocket
from tests.support.crash.rigs import DeviceTable

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = [
    "RECOVERY_S",
    "Backend",
    "BackendTable",
    "Trouble",
    "connect_in_memory",
]

OPS: Final = {
    consts.CMD_READ: OP_READ,
    consts.CMD_WRITE: OP_WRITE,
    consts.CMD_FLUSH: OP_FLUSH,
    consts.CMD_TRIM: OP_DISCARD,
    consts.CMD_WRITE_ZEROES: OP_WRITE_ZEROES,
    consts.CMD_CACHE: OP_CACHE,
}
FLAGS: Final = (
    consts.FLAG_SEND_FLUSH,
    consts.FLAG_SEND_FUA,
    consts.FLAG_SEND_TRIM,
    consts.FLAG_SEND_WRITE_ZEROES,
    consts.FLAG_SEND_CACHE,
    consts.FLAG_CAN_MULTI_CONN,
)
AWAY_S: Final = (0.0, 0.0, 0.1, 2.0, 20.0)
HANGS_S: Final = (0.5, 5.0, 20.0)
QUIETS_S: Final = (0.01, 0.5, 5.0, 60.0)
# From the moment when a server is back until every device must have found it.
RECOVERY_S: Final = 25.0
RECEIVE: Final = 4096
PATIENCE: Final = 200  # looks for something that can be lost
# A cache may become smaller, and metadata of anything may be made anew where the operator allows it.
EXCHANGED: Final = ("disk", "destination", "source", "origin")


class Backend:
    """See the module head."""

    def __init__(
        self,
        network: SimNetwork,
        disk: SimDisk,
        rng: random.Random,
        loop: asyncio.AbstractEventLoop,
    ) -> None:
        self.disk = disk
        self._own_disk = disk
        self.is_up = True
        self.is_hung = False
        self._network = network
        self._loop = loop
        self._sessions: list[_Session] = []
        self._flags = FLAGS[0] | sum(flag for flag in FLAGS[1:] if rng.random() < 0.7)

    def lookup(self, name: str) -> ExportInfo | None:
        return ExportInfo("", self.disk.size, self._flags, contexts=())

    def names(self) -> list[tuple[str, str]]:
        return [("", "")]

    def connect(self) -> SimSocket:
        """Raises: ConnectionRefusedError."""
        if not self.is_up:
            raise ConnectionRefusedError
        client, server = self._network.pair()
        self._sessions.append(_Session(self, server, self._loop))
        return client

    def kill(self) -> None:
        self.is_up = self.is_hung = False
        sessions, self._sessions = self._sessions, []
        for session in sessions:
            session.die()

    def cut_power(self, seed: int, fate: Fate) -> None:
        self.kill()
        self.disk.lose_power(seed, fate)

    def come_back(self, another: SimDisk | None = None) -> None:
        self.is_up = True
        self.disk = another or self._own_disk

    def hang(self) -> None:
        self.is_hung = True
        for session in self._sessions:
            session.watch()

    def go_on(self) -> None:
        self.is_hung = False
        for session in self._sessions:
            session.go_on()

    def forget(self, session: "_Session") -> None:
        if session in self._sessions:
            self._sessions.remove(session)


class _Session:
    """One connection of a backend."""

    def __init__(
        self, backend: Backend, sock: SimSocket, loop: asyncio.AbstractEventLoop
    ) -> None:
        self._backend = backend
        self._disk = backend.disk
        self._sock: SimSocket | None = sock
        self._loop = loop
        self._handshake: ServerHandshake | None = ServerHandshake(backend)
        self._replies: Replies = SimpleReplies()
        self._in = bytearray()
        self._out = bytearray()
        self._bios: set[Bio] = set()
        self._is_leaving = False
        self._is_reading = self._is_writing = False
        self._send_handshake()

    def die(self) -> None:
        if self._sock is None:
            return
        bios, self._bios = self._bios, set()
        self._disk.abandon(bios)
        sock = self._stop()
        sock.reset()

    def go_on(self) -> None:
        self._flush_out()
        self._parse()
        self.watch()

    def watch(self) -> None:
        """Read and write what the socket has or takes; nothing, while the server hangs."""
        if self._sock is None:
            return
        fd, hung = self._sock.fileno(), self._backend.is_hung
        may_read = not (hung or self._is_leaving)
        if may_read != self._is_reading:
            self._is_reading = may_read
            if may_read:
                self._loop.add_reader(fd, self._readable)
            else:
                self._loop.remove_reader(fd)
        may_write = bool(self._out) and not hung
        if may_write != self._is_writing:
            self._is_writing = may_write
            if may_write:
                self._loop.add_writer(fd, self._flush_out)
            else:
                self._loop.remove_writer(fd)

    def _stop(self) -> SimSocket:
        sock, self._sock = self._sock, None
        assert sock is not None
        if self._is_reading:
            self._loop.remove_reader(sock.fileno())
        if self._is_writing:
            self._loop.remove_writer(sock.fileno())
        self._is_reading = self._is_writing = False
        self._backend.forget(self)
        return sock

    def _readable(self) -> None:
        assert self._sock is not None
        try:
            data = self._sock.recv(RECEIVE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        if not data:
            self._leave()
            return
        if self._handshake is not None:
            self._handshake.receive_data(data)
            self._send_handshake()
        else:
            self._in += data
        self._parse()

    def _leave(self) -> None:
        """The client is gone: what it has sent is carried out, then the connection ends."""
        self._is_leaving = True
        self._out.clear()
        self.watch()
        self._maybe_end()

    def _maybe_end(self) -> None:
        if self._is_leaving and not self._bios and not self._out and self._sock:
            self._stop().close()

    def _send_handshake(self) -> None:
        handshake = self._handshake
        assert handshake is not None
        for piece in handshake.data_to_send():
            self._out += piece
        if handshake.negotiated is not None:
            self._replies = replies_of(handshake.negotiated)
            self._in += handshake.trailing_data()
            self._handshake = None
        self._flush_out()

    def _parse(self) -> None:
        while self._handshake is None and self._sock and not self._backend.is_hung:
            layout = self._replies.request
            begin = layout.size
            if len(self._in) < begin:
                return
            _, flags, command, cookie, offset, length = layout.unpack_from(self._in)
            end = begin + (length if command == consts.CMD_WRITE else 0)
            if len(self._in) < end:
                return
            payload = bytes(self._in[begin:end])
            del self._in[:end]
            if command == consts.CMD_DISC:
                self._is_leaving = True
                self.watch()
                self._maybe_end()
                return
            self._start(command, flags, cookie, offset, length, payload)

    def _start(
        self,
        command: int,
        flags: int,
        cookie: int,
        offset: int,
        length: int,
        payload: bytes,
    ) -> None:
        view: memoryview | None = None
        if command == consts.CMD_READ:
            view = memoryview(bytearray(length))
        elif command == consts.CMD_WRITE:
            view = memoryview(payload)
        bio_flags = FUA if flags & consts.CMD_FLAG_FUA else 0
        bio_flags |= NO_UNMAP if flags & consts.CMD_FLAG_NO_HOLE else 0
        if command == consts.CMD_FLUSH:
            offset = length = 0

        def ended(bio: Bio) -> None:
            if bio in self._bios:
                self._bios.discard(bio)
                self._answer(command, cookie, bio)

        bio = Bio(OPS[command], offset, length, view, bio_flags, ended)
        self._bios.add(bio)
        self._disk.submit(bio)

    def _answer(self, command: int, cookie: int, bio: Bio) -> None:
        if self._sock is None:
            return
        replies, offset = self._replies, bio.offset
        assert replies.structured
        if bio.status:
            self._out += replies.error(cookie, offset, consts.EIO, "")
        elif command == consts.CMD_READ:
            assert bio.payload is not None
            self._out += replies.data(cookie, offset, bio.length)
            self._out += bio.payload
        else:
            self._out += replies.done(command, cookie, offset)
        self._flush_out()
        self._maybe_end()

    def _flush_out(self) -> None:
        while self._sock and self._out and not self._backend.is_hung:
            try:
                sent = self._sock.send(self._out)
            except BlockingIOError:
                break
            except OSError:
                self._out.clear()
                break
            del self._out[:sent]
        self.watch()


class BackendTable(DeviceTable):
    """Opens the disks of a life: those behind a backend as any NBD server's."""

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        if name.startswith(BACKEND):
            return await open_nbd(name, read_only=read_only)
        return await super().open_device(name, read_only=read_only)

    def identity(self, name: str) -> str:
        if name.startswith(BACKEND):
            return str(parse_nbd_uri(name).identity)
        return name


async def connect_in_memory(name: str, uri: NbdUri) -> socket.socket:
    """Connect to a backend in memory, in place of a real connection. The running loop knows the backends."""
    backends: dict[str, Backend] = asyncio.get_running_loop().backends  # type: ignore[attr-defined]
    try:
        return cast(socket.socket, backends[uri.host].connect())
    except ConnectionRefusedError as error:
        reason = "cannot connect: connection refused"
        raise ResolveError(name, reason, error.errno or 111) from None


class Trouble:
    """Kills, hangs and exchanges the backends of one life."""

    def __init__(self, life: "Life", rng: random.Random) -> None:
        self._life = life
        self._random = rng
        self._roles = {disk.name: disk.role for disk in life.rig.disks}

    async def run(self) -> None:
        life, rng = self._life, self._random
        pause_s = rng.choice(QUIETS_S)
        while not life.is_stopping:
            await asyncio.sleep(rng.random() * pause_s)
            if life.are_clients_done():
                return
            host = rng.choice(list(life.backends))
            kinds = (
                self._restart,
                self._lose,
                self._lose,
                self._lose,
                self._hang,
                self._exchange,
            )
            await rng.choice(kinds)(host, life.backends[host])

    async def _restart(self, host: str, backend: Backend) -> None:
        """The process dies, perhaps after it has hung, and is started again."""
        if self._random.random() < 0.3:
            await self._hang_for_a_while(host, backend)
        self._begin(host, "is killed")
        backend.kill()
        await self._stay_away()
        backend.come_back()
        self._end(host)

    async def _lose(self, host: str, backend: Backend) -> None:
        fate = self._random.choice((Fate.DROP, *Fate))
        for _ in range(PATIENCE):
            if backend.disk.nr_pending or self._life.is_stopping:
                break  # there is something to lose
            await asyncio.sleep(0.01)
        self._begin(host, f"loses power ({fate.value})")
        backend.cut_power(self._random.randrange(1 << 32), fate)
        await self._stay_away()
        backend.come_back()
        self._end(host)

    async def _hang(self, host: str, backend: Backend) -> None:
        """Hang for a while. Requests take longer, but must not fail."""
        await self._hang_for_a_while(host, backend)
        backend.go_on()
        self._life.note(host, "goes on")

    async def _hang_for_a_while(self, host: str, backend: Backend) -> None:
        self._life.note(host, "hangs")
        self._life.nr_departures += 1
        if self._life.is_stopping:
            self._life.corner()  # a stop gives up what hangs
        backend.hang()
        await asyncio.sleep(self._random.choice(HANGS_S))

    async def _exchange(self, host: str, backend: Backend) -> None:
        """For a while another, smaller disk is served under its name.

        A larger one could be the same disk, grown: that a table may be loaded over.
        """
        if host not in EXCHANGED:
            await self._restart(host, backend)
            return
        self._begin(host, "is another disk")
        backend.kill()
        size = backend.disk.size - 8 * SECTOR
        backend.come_back(SimDisk(size, content=self._random.randbytes(size)))
        await self._stay_away()
        backend.kill()
        backend.come_back()
        self._end(host)

    async def _stay_away(self) -> None:
        await asyncio.sleep(self._random.choice(AWAY_S))

    def _begin(self, host: str, what: str) -> None:
        self._life.note(host, what)
        is_written = self._roles["/" + host] is not Role.SOURCE
        self._life.backend_goes(is_written=is_written)

    def _end(self, host: str) -> None:
        self._life.note(host, "is back")
        self._life.backend_is_back()
