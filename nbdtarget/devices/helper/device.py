# SPDX-License-Identifier: Apache-2.0
"""`HelperDevice`: a disk that a helper opens, as an export of an NBD server that is ours alone.

Theory of operation. To everything above it is an `NbdDevice` that is only read: several connections, block status with holes, bulk
copies, and connecting again after a loss, each time after a longer while. What is added is the server's life:

    open          an image is looked at (`image_info.py`), the program is started, and connected to
    it ends       our connections end with it; before each new attempt to connect it is started again
    it hangs      a read that is not answered in time loses the connections; if a live program does not take new ones,
                  it is ended, and another one is started at the next attempt
    close         the connections first, then the program: nbdkit stays while a client is connected

Another process that takes over from this one (`nbdtarget upgrade`) starts a helper of its own. Nothing is lost by that, because nothing is written here.
"""

import asyncio
import contextlib
import errno as errnos
import logging
import os
from functools import partial
from typing import Final

from nbdtarget.common.clock import timeout, wait_within
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.image_info import refuse_references
from nbdtarget.devices.helper.process import Helper
from nbdtarget.devices.helper.words import HelperName, QemuName
from nbdtarget.devices.identity import HELPER
from nbdtarget.devices.nbd.connect import connect_all
from nbdtarget.devices.nbd.connection import NbdConnection, connect
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.devices.nbd.uri import NbdUri
from nbdtarget_metadata.disks import Evidence

__all__ = ["HelperDevice", "open_helper"]

ANSWER_S_MAX: Final = 30.0  # to open the image; a far one takes a while
LAST_WORDS_S: Final = 1.0  # for the end of a helper whose connections have broken

log = logging.getLogger(__name__)


class HelperDevice(NbdDevice):
    """See the module head. Made by `open_helper`."""

    may_be_container = False  # the name says in which format it is

    def __init__(
        self, words: HelperName, helper: Helper, connections: list[NbdConnection]
    ) -> None:
        connecting = partial(_connected, words, helper)
        super().__init__(words.shown, connections, connecting, read_only=True)
        self.secret_name = words.name if words.shown != words.name else ""
        self._words = words
        self._helper = helper

    @property
    def helper_pid(self) -> int | None:
        """Of the program, while it runs."""
        return self._helper.pid

    async def measure(self) -> int:
        await self._helper.start()
        connection = await connect(self.name, _uri(self._words, self._helper))
        connection.close()
        return connection.negotiated.size

    async def identify(self, role: str) -> Evidence:
        return Evidence(
            HELPER,
            self.bare_name,
            self.size,
            self._words.ids,
            mtime_ns=await asyncio.to_thread(_mtime_ns, self._words),
        )

    async def close(self) -> None:
        await super().close()
        await self._helper.close()


async def open_helper(words: HelperName, *, read_only: bool) -> HelperDevice:
    """Start the helper and connect to it. Raises: ResolveError; then nothing runs."""
    if not read_only:
        raise ResolveError(
            words.shown,
            "can only be read: use it as the source of a clone, or export it with --readonly",
            errnos.EROFS,
        )
    if isinstance(words, QemuName):
        await refuse_references(words)
    try:
        helper = Helper(words.shown, words.argv)
    except OSError as error:
        reason = f"no socket for its helper: {error.strerror}"
        raise ResolveError(words.shown, reason, error.errno or errnos.EIO) from None
    try:
        return HelperDevice(words, helper, await _connected(words, helper))
    except BaseException:  # it may be cancelled, and then no program is left running
        await helper.close()
        raise


def _uri(words: HelperName, helper: Helper) -> NbdUri:
    return NbdUri(
        export_name="",
        socket_path=helper.socket_path,
        connections=words.connections,
    )


async def _connected(words: HelperName, helper: Helper) -> list[NbdConnection]:
    """Connect, and start the helper before if it does not run. Raises: ResolveError: with its last words."""
    await helper.start()
    connecting = asyncio.ensure_future(
        connect_all(words.shown, _uri(words, helper), read_only=True)
    )
    ending = asyncio.ensure_future(helper.ended())
    try:
        with contextlib.suppress(TimeoutError):  # then neither is done
            async with timeout(ANSWER_S_MAX):
                await asyncio.wait(
                    [connecting, ending], return_when=asyncio.FIRST_COMPLETED
                )
        if connecting.done() and connecting.exception() is None:
            return connecting.result()
        if connecting.done():
            await wait_within([ending], LAST_WORDS_S)
        if ending.done():
            raise ResolveError(words.shown, helper.why_it_ended())
        # It runs, and does not answer as it should: the next attempt gets another one.
        await helper.end()
        if connecting.done():
            raise connecting.exception() or AssertionError("it has failed")
        reason = f"{helper.program} does not answer within {ANSWER_S_MAX:.0f} s"
        raise ResolveError(words.shown, reason, errnos.ETIMEDOUT)
    finally:
        ending.cancel()
        await _taken_back(connecting)


async def _taken_back(connecting: "asyncio.Future[list[NbdConnection]]") -> None:
    """Cancel an attempt that is still under way, and wait for its end."""
    if connecting.done():
        return
    connecting.cancel()
    await asyncio.wait([connecting])
    if not connecting.cancelled() and connecting.exception() is None:
        for connection in connecting.result():
            connection.close()


def _mtime_ns(words: HelperName) -> int:
    """When the image was last written to; 0: it is not known."""
    if not isinstance(words, QemuName) or not words.is_path:
        return 0
    try:
        return os.stat(words.what).st_mtime_ns
    except OSError:
        return 0
