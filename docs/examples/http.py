# SPDX-License-Identifier: Apache-2.0
"""`http://HOST[:PORT]/PATH`: a file on a web server as a disk that can only be read.

Theory of operation. Opening asks for the size of the file, with HEAD. A READ asks for its bytes,
with a Range header, in a task of its own. That takes time, so the bio is owned first: its payload
may be a buffer that the next request will use.

This is an example. A real one would connect again after an error, and would notice that the file
is another one by now.
"""

import errno as errnos
from typing import ClassVar

import aiohttp

from nbdtarget.bio import OP_READ, Bio
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.turns import Tasks
from nbdtarget.devices.base import Device
from nbdtarget.devices.scheme import Scheme

__all__ = ["HttpScheme"]


class HttpDevice(Device):
    """One file. As every device, it runs on the thread of the event loop only."""

    may_be_container = True  # it may be a qcow2 image, for example

    def __init__(self, name: str, size: int, session: aiohttp.ClientSession) -> None:
        super().__init__(name, size, read_only=True)
        self._session = session
        self._tasks = Tasks()

    def submit(self, bio: Bio) -> None:
        errno = self.check_bounds(bio)  # EPERM for all that would change the disk
        if errno or bio.op != OP_READ:
            # A FLUSH has nothing to do, since nothing was written. CACHE is only advice.
            bio.end(errno)
            return
        bio.own()
        self._tasks.start(self._read(bio))

    async def _read(self, bio: Bio) -> None:
        assert bio.payload is not None
        last = bio.offset + bio.length - 1
        try:
            data = await self._get(f"bytes={bio.offset}-{last}")
        except aiohttp.ClientError as error:
            self.health.last_error = str(error)
            bio.end(errnos.EIO)
            return
        if (
            len(data) != bio.length
        ):  # the server does not know Range, or the file is shorter
            bio.end(errnos.EIO)
            return
        bio.payload[:] = data
        bio.end(0)

    async def _get(self, wanted: str) -> bytes:
        async with self._session.get(self.name, headers={"Range": wanted}) as answer:
            answer.raise_for_status()
            return await answer.read()

    async def close(self) -> None:
        await self._tasks.wait()
        await self._session.close()


class HttpScheme(Scheme):
    name: ClassVar[str] = "http"
    syntax: ClassVar[str] = "http://HOST[:PORT]/PATH"
    summary: ClassVar[str] = "a file on a web server, read-only"

    async def open(self, name: str, *, read_only: bool) -> Device:
        if not read_only:
            raise ResolveError(name, "can only be read", errnos.EROFS)
        session = aiohttp.ClientSession()
        try:
            async with session.head(name) as answer:
                answer.raise_for_status()
                size = answer.content_length or 0
        except (aiohttp.ClientError, ValueError) as error:
            await session.close()
            raise ResolveError(name, str(error)) from error
        if not size:
            await session.close()
            raise ResolveError(name, "the server does not tell its size")
        return HttpDevice(name, size, session)
