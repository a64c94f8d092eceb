# SPDX-License-Identifier: Apache-2.0
"""`Watch`: which events of one socket the event loop is asked for."""

import asyncio
from collections.abc import Callable

__all__ = ["Watch"]


class Watch:
    """One socket.

    Attributes:
        fd: of the socket, also when that is closed.
        is_reading: whether the loop calls when there is something to receive.
        is_noticing: see `notice`.
        is_writing: whether the loop calls when there is room to send.
    """

    __slots__ = ("_loop", "fd", "is_noticing", "is_reading", "is_writing")

    def __init__(self, loop: asyncio.AbstractEventLoop, fd: int) -> None:
        self._loop = loop
        self.fd = fd
        self.is_reading = False
        self.is_noticing = False
        self.is_writing = False

    def read(self, call: Callable[[], object]) -> None:
        """Have `call` called when there is something to receive."""
        self._loop.add_reader(self.fd, call)
        self.is_reading = True
        self.is_noticing = False

    def notice(self, call: Callable[[], object]) -> None:
        """Have `call` called in place of what `read` was given, until `read` is called again."""
        self.read(call)
        self.is_noticing = True

    def stop_reading(self) -> None:
        if self.is_reading:
            self._loop.remove_reader(self.fd)
            self.is_reading = self.is_noticing = False

    def write(self, call: Callable[[], object]) -> None:
        """Have `call` called when there is room to send, if that is not so already."""
        if not self.is_writing:
            self._loop.add_writer(self.fd, call)
            self.is_writing = True

    def stop_writing(self) -> None:
        if self.is_writing:
            self._loop.remove_writer(self.fd)
            self.is_writing = False

    def stop(self) -> None:
        """Ask for nothing any more: the socket is going to be closed."""
        self.stop_reading()
        self.stop_writing()
