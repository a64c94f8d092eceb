# SPDX-License-Identifier: Apache-2.0
"""`HelperDevice`: a disk that a helper opens, as an export of an NBD server that is ours alone.

Theory of operation. To everything above it is an `NbdDevice` that is only read: several connections, block status with holes, bulk
copies, and connecting again after a loss, each time after a longer while. This class adds the life of the server:

    open          an image is looked at (`image_info.py`, `state.py`), the program is started, and connected to
    it ends       our connections end with it; before each new attempt to connect it is started again
    it hangs      a read that is not answered in time loses the connections; if a live program does not take new ones,
                  it is ended, and another one is started at the next attempt
    it is back    with the same image, or nothing more is read: `changed` says why, as for a remote image
    close         the connections first, then the program: nbdkit stays while a client is connected

*Reads wait.* A read that comes while the helper is away, or was under way when it died, waits for the next one (`NbdDevice.holds_reads`): to start
a program again takes a moment, and a guest that got an error would not ask again. After `source-timeout` it ends with an error.

*Containers.* An image on a web server or in an object store is opened by ourselves, and the helper reads it from us (`container.py`). That it was replaced, or is away, is noticed
there, and shown here. A read is not too late then, however long the server is away.

Another process that takes over from this one (`nbdtarget upgrade`) starts a helper of its own. Nothing is lost by that, because nothing is written here.
"""

import asyncio
import contextlib
import errno as errnos
import logging
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import Final

from nbdtarget.common.clock import timeout, wait_within
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.base import Device
from nbdtarget.devices.helper.container import Container
from nbdtarget.devices.helper.image_info import refuse_references
from nbdtarget.devices.helper.nbdkit_filters import refuse_wrong_filters
from nbdtarget.devices.helper.process import Helper
from nbdtarget.devices.helper.programs import missing
from nbdtarget.devices.helper.state import ImageState, look_at_image
from nbdtarget.devices.helper.words import (
    HelperName,
    NbdkitName,
    QemuName,
    parse_qemu,
    qemu_name,
)
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
    holds_reads = True

    def __init__(self, source: "_Source", connections: list[NbdConnection]) -> None:
        words = source.words
        super().__init__(words.shown, connections, self._connect_same, read_only=True)
        self.secret_name = words.name if words.shown != words.name else ""
        self.hold_s_max = words.source_timeout_s
        self._source = source
        if source.container is not None:
            below = source.container.device
            assert below.traffic is not None
            self.traffic = below.traffic
            below.health.watchers.append(self._container_changed)

    @property
    def helper_pid(self) -> int | None:
        """The process id of the program, while it runs."""
        return self._source.helper.pid

    async def _connect_same(self) -> list[NbdConnection]:
        """Connect to the helper, which has perhaps opened its image again. Raises: ResolveError."""
        source = self._source
        connections = await _connected(source.words, source.helper)
        try:
            found = await look_at_image(source.words)
            if difference := source.state.difference(found):
                reason = f"the image was replaced or written to: {difference}"
                self._give_up(reason)
                raise ResolveError(self.name, reason)
        except BaseException:  # a cancelled opening leaves no connection behind
            for connection in connections:
                connection.close()
            raise
        return connections

    def _give_up(self, reason: str) -> None:
        """Never read from the image again, because it has changed."""
        self.changed = reason
        log.error("%s: %s; nothing more is read from it", self.name, reason)
        self.give_up_for_good()

    def _container_changed(self) -> None:
        assert self._source.container is not None
        reason = self._source.container.device.changed
        if reason and not self.changed:
            self._give_up(reason)

    async def measure(self) -> int:
        await self._source.helper.start()
        uri = _uri(self._source.words, self._source.helper)
        connection = await connect(self.name, uri)
        connection.close()
        return connection.negotiated.size

    async def check_again(self) -> None:
        # What opens the image again starts a helper of its own.
        source = self._source
        if source.container is not None:
            await source.container.device.check_again()
        if difference := source.state.difference(await look_at_image(source.words)):
            reason = f"the image was replaced or written to: {difference}"
            raise ResolveError(self.name, reason)

    async def identify(self, role: str) -> Evidence:
        source = self._source
        ids = (*source.words.ids, *source.state.ids)
        if source.container is None:
            state = source.state
            if source.words.file:  # it may have been written to since it was opened
                state = await look_at_image(source.words)
            pinned, mtime_ns = state.is_pinned, state.mtime_ns
        else:
            below = await source.container.device.identify(role)
            # The size is not needed beside an ETag, and there is room for four.
            told = [each for each in below.ids if not each.startswith("size=")]
            told = told if below.is_pinned else list(below.ids)
            ids = (source.words.ids[0], *told)
            pinned, mtime_ns = below.is_pinned, 0
        return Evidence(
            HELPER, self.bare_name, self.size, ids, mtime_ns=mtime_ns, is_pinned=pinned
        )

    def give_up_reads(self) -> None:
        if self._source.container is not None:
            self._source.container.device.give_up_reads()
        super().give_up_reads()

    async def use_name(self, name: str) -> None:
        source = self._source
        if source.container is None or not isinstance(source.words, QemuName):
            return await super().use_name(name)
        if name.startswith("qemu:"):
            words = parse_qemu(name)
        else:
            mark, options = source.words.name.partition("#")[1:]
            words = parse_qemu(qemu_name(source.words.format, name) + mark + options)
        if not words.container or words.format != source.words.format:
            raise ResolveError(words.shown, "is no name of the same image")
        await source.container.device.use_name(words.container)
        source.words = words.in_container(source.container.path)
        self.name = self.bare_name = words.shown
        self.secret_name = words.name if words.shown != words.name else ""

    async def close(self) -> None:
        await super().close()
        await self._source.close()


class _Source:
    """The parts of an open image.

    Attributes:
        state: of the image, when it was opened.
    """

    def __init__(self, words: HelperName, container: Container | None) -> None:
        """Raises: ResolveError: there is no socket."""
        self.words = words
        self.container = container
        fds = () if container is None else (container.fd,)
        try:
            self.helper = Helper(words.shown, words.argv, fds)
        except OSError as error:
            reason = f"no socket for its helper: {error.strerror}"
            raise ResolveError(words.shown, reason, error.errno or errnos.EIO) from None
        self.state = ImageState()

    async def open(self) -> HelperDevice:
        """Raises: ResolveError."""
        before = await look_at_image(self.words)
        connections = await _connected(self.words, self.helper)
        try:
            self.state = await look_at_image(self.words)
            if difference := before.difference(self.state):
                reason = f"the image is being changed: {difference}"
                raise ResolveError(self.words.shown, reason)
            return HelperDevice(self, connections)
        except BaseException:  # a cancelled opening leaves no connection behind
            for connection in connections:
                connection.close()
            raise

    async def close(self) -> None:
        await self.helper.close()
        if self.container is not None:
            await self.container.close()


async def open_helper(
    words: HelperName,
    *,
    read_only: bool,
    open_container: Callable[[str], Awaitable[Device]] | None = None,
) -> HelperDevice:
    """Start the helper and connect to it.

    Args: open_container: opens the disk of ours in which an image lies, by its name.
    Raises: ResolveError; then nothing runs.
    """
    if not read_only:
        raise ResolveError(
            words.shown,
            "can only be read: use it as the source of a clone, or export it with --readonly",
            errnos.EROFS,
        )
    if reason := missing(words.program):
        raise ResolveError(words.shown, reason)
    container = None
    source = None
    try:
        if isinstance(words, QemuName) and words.container:
            assert open_container is not None
            container = await _container(words, await open_container(words.container))
            words = words.in_container(container.path)
        if isinstance(words, QemuName):
            fds = () if container is None else (container.fd,)
            await refuse_references(words, fds)
        elif isinstance(words, NbdkitName):
            await refuse_wrong_filters(words)
        source = _Source(words, container)
        return await source.open()
    except BaseException:  # it may be cancelled, and then no program is left running
        if source is not None:
            await source.close()
        elif container is not None:
            await container.close()
        raise


async def _container(words: HelperName, device: Device) -> Container:
    """Raises: ResolveError; then the device is closed."""
    try:
        container = Container(device)
    except OSError as error:
        await device.close()
        reason = f"no socket for its image: {error.strerror}"
        raise ResolveError(words.shown, reason, error.errno or errnos.EIO) from None
    await container.start()
    return container


def _uri(words: HelperName, helper: Helper) -> NbdUri:
    uri = NbdUri(
        export_name="",
        socket_path=helper.socket_path,
        connections=words.connections,
    )
    if isinstance(words, QemuName) and words.container:
        return replace(uri, read_timeout_s=0.0)
    return uri


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
