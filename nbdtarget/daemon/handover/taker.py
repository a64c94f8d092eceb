# SPDX-License-Identifier: Apache-2.0
"""`Offer`: the new process's side of a hand-over. The old side, and the order of things: `giver.py`, `messages.py`."""

import os
import socket
from typing import Final

from nbdtarget import __version__
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.passed_stderr import keep_from_children, restore_stderr
from nbdtarget.daemon.handover.channel import Channel, ChannelError
from nbdtarget.daemon.handover.giver import VARIABLE
from nbdtarget.daemon.handover.messages import (
    FORMAT,
    Failed,
    Go,
    Hello,
    Moved,
    Prepared,
)

__all__ = ["Offer", "maybe_offer"]

# There is no bound on how long this process waits: the old one has bounds, and kills this one before it goes on by itself.
_FOR_EVER: Final = None


class Offer:
    """The things that another process wants to hand over."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    async def receive(self) -> tuple[Moved, list[int]]:
        """Say that this process is ready, and wait until the other one has come to rest.

        Raises: ChannelError: the other process has ended, goes on by itself, or is one that this version does not
            understand.
        """
        hello, _ = await self._channel.receive(_FOR_EVER)
        if not isinstance(hello, Hello):
            raise ChannelError("the other process does not begin with Hello")
        await self._channel.send(Hello(FORMAT, __version__))
        if hello.format != FORMAT:
            raise ChannelError(
                f"nbdtarget {hello.version} hands over in format {hello.format}, and nbdtarget {__version__}"
                f" in format {FORMAT}"
            )
        moved, fds = await self._channel.receive(_FOR_EVER)
        if not isinstance(moved, Moved):
            raise ChannelError("the other process sends no devices")
        return moved, fds

    async def prepared(self) -> None:
        """Say that all is open, and wait until the other process has let go.

        It has also let go if it has ended. Raises: ChannelError: it goes on by itself.
        """
        try:
            await self._channel.send(Prepared())
            answer, _ = await self._channel.receive(_FOR_EVER)
        except ChannelError as error:
            if not error.has_ended:
                raise
        else:
            if not isinstance(answer, Go):
                raise ChannelError("the other process does not say Go")
        restore_stderr()
        self._channel.close()

    def close(self) -> None:
        """Let go of the channel: to the other process it is as if this one had ended."""
        self._channel.close()

    async def fail(self, error: NbdTargetError) -> None:
        """Give up: the other process goes on."""
        await self._channel.send(Failed("; ".join(error.lines())))
        self._channel.close()


def maybe_offer() -> Offer | None:
    """Return the offer that this process was started for, if there is one. Later calls, and children, see none."""
    number = os.environ.pop(VARIABLE, "")
    if not (number.isascii() and number.isdecimal()):
        return None
    os.set_inheritable(int(number), False)
    keep_from_children()
    return Offer(Channel(socket.socket(fileno=int(number))))
