# SPDX-License-Identifier: Apache-2.0
"""`hand_over`: the old process's side of a hand-over.

    1  the new program is started, and loads its code; all devices are flushed, and it is looked whether their disks can be opened
       again; clients notice nothing yet
    2  no connection is accepted and no request begun any more; those that have begun end, or stand still between two slices
    3  all devices are suspended, which flushes and commits, and their disks are closed
    4  everything is sent; the new process opens the disks
    5  Go: this process does nothing any more

The pause that clients notice is from 2 to 5. If anything goes wrong before 5, the new process is killed, the devices are opened
again, and everything goes on here. Each step has a bound. A device that cannot be opened again then is named in the error, and
tried again and again (`nbdtarget.dm.reopenings`). No client is disconnected before 5.

Durable: after 3, everything that has ended. At no time do two processes have the same disk open for writing.
"""

import errno as errnos
import logging
import os
import socket
import subprocess
from collections.abc import Sequence
from typing import Final, Protocol, TypeVar

from nbdtarget import __version__
from nbdtarget.common.clock import monotonic_ns
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.words import printable
from nbdtarget.daemon.handover.channel import Channel, ChannelError
from nbdtarget.daemon.handover.messages import (
    FORMAT,
    Go,
    Hello,
    Message,
    Moved,
    Prepared,
)
from nbdtarget.daemon.handover.program import VARIABLE, Program
from nbdtarget.dm.handover import Parking

__all__ = ["VARIABLE", "Giving", "hand_over"]

log = logging.getLogger(__name__)

START_S_MAX: Final = 60.0
REST_S_MAX: Final = 10.0
PREPARE_S_MAX: Final = 30.0
VERSION_SHOWN_MAX: Final = 100

M = TypeVar("M", bound=Message)


class Giving(Protocol):
    """The parts of `Daemon` that are handed over."""

    async def freeze(self, within_s: float) -> list[str]:
        """Hold back all that is new. Returns what has not ended in time, by name.

        Raises: TableError: it is known that something will not end.
        """
        ...

    async def thaw(self) -> None:
        """Undo `freeze`."""
        ...

    def parking(self) -> Parking:
        """Return the parking of the devices."""
        ...

    def moved(self, parking: Parking) -> tuple[Moved, list[int]]:
        """Return the state of the server, and its descriptors. Called when all is at rest."""
        ...


async def hand_over(giving: Giving, argv: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start `argv`, and hand everything over to it. Returns the new process.

    Raises: NbdTargetError: everything goes on here as before, but for devices that it says could not be opened again.
    """
    ours, theirs = socket.socketpair()
    channel = Channel(ours)
    try:
        program = await Program.start(argv, theirs)
        theirs.close()
        try:
            await channel.send(Hello(FORMAT, __version__))
            hello = await _expect(channel, Hello, START_S_MAX)
            if hello.format != FORMAT:
                raise ChannelError(
                    f"nbdtarget {printable(hello.version, VERSION_SHOWN_MAX)} hands over in format"
                    f" {hello.format}, and nbdtarget {__version__}, which serves now, in format {FORMAT}:"
                    " restart instead"
                )
            await _give(giving, channel, program)
        except BaseException as error:
            # Also when this task is cancelled: the new process must never outlive a hand-over that has failed.
            raise await program.end(error) from None
        program.let_go()
    finally:
        theirs.close()
        channel.close()
    return program.process


async def _give(giving: Giving, channel: Channel, program: Program) -> None:
    """Do the hand-over from the moment when clients are held back. Raises: NbdTargetError: it has been undone."""
    parking = giving.parking()
    await parking.flush_ahead()
    await parking.check()
    begun_ns = monotonic_ns()
    try:
        if busy := await giving.freeze(REST_S_MAX):
            raise TableError(
                f"requests of {', '.join(busy)} have not ended for {REST_S_MAX:g} s",
                errnos.ETIMEDOUT,
            )
        await parking.park()
        moved, fds = giving.moved(parking)
        await channel.send(moved, fds)
        await _expect(channel, Prepared, PREPARE_S_MAX)
        # Not `send`: it could be cancelled after Go has left, and then two processes would go on.
        channel.send_now(Go((monotonic_ns() - begun_ns) / 1e9))
    except BaseException as error:
        # It may have disks open, which are to be opened here again.
        error = await program.end(error)
        failures = await parking.undo()
        await giving.thaw()
        for failure in failures:
            log.error("not handed over, and not as before: %s", failure)
        if not failures or not isinstance(error, NbdTargetError):
            raise error from None
        what = f"not everything goes on as before: {'; '.join(failures)}"
        raise TableError(f"{error}; {what}", errnos.EIO) from error
    log.info("handed over after %.3f s", (monotonic_ns() - begun_ns) / 1e9)


async def _expect(channel: Channel, kind: type[M], within_s: float) -> M:
    message, fds = await channel.receive(within_s)
    for fd in fds:
        os.close(fd)
    if not isinstance(message, kind):
        raise ChannelError(
            f"the other process says {type(message).__name__} out of turn"
        )
    return message
