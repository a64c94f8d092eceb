# SPDX-License-Identifier: Apache-2.0
"""The server process: registry, NBD listener and control socket under one roof.

Theory of operation. Everything runs on one event loop. `Daemon` puts the three together and
takes them down again in the one order that loses nothing:

    1. the listener stops accepting; requests in flight are carried out and answered
    2. every mapped device is suspended, which commits, and removed, upper ones first
    3. the control socket goes: until here `status` still answers

SIGTERM, SIGINT and SIGHUP (the terminal is closed) begin this. After the first of them
the signals have their usual effect again, so that a second Ctrl-C ends a process that hangs on
a dead disk. What is on disk then is what a power cut would leave: nothing acknowledged is lost.

With a configuration file SIGHUP means: read it again (`nbdtarget.config.devices`). One that comes
while the server starts, or while the file is being followed, is carried out afterwards; any
number of them are one.

Sockets that were passed (`LISTEN_FDS`) are served beside those that were asked for.
"""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Final, TypeVar

import msgspec

from nbdtarget.control.api import ControlServer
from nbdtarget.control.paths import (
    ControlAddress,
    control_address,
    control_token,
    runtime_directory,
)
from nbdtarget.control.sockets import SocketInUseError
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from nbdtarget.errors import NbdTargetError
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener

__all__ = [
    "Daemon",
    "ServeOptions",
    "default_listen",
    "passed_sockets",
    "run",
    "serve_until_stopped",
]

_log = logging.getLogger(__name__)

GRACE_S_MAX: Final = 10.0  # how long requests in flight may take at the end
LISTEN_FDS_START: Final = 3
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

T = TypeVar("T")


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """What `serve` was asked for. No `listen`: a unix socket in the runtime directory.

    `config` is a file's path; `listen` and `control` win over what stands there.
    """

    listen: tuple[str, ...] = ()
    control: str | None = None
    control_token_file: str | None = None
    config: str | None = None


def passed_sockets() -> list[int]:
    """The listening sockets that the service manager passed to this very process."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return []
    count = os.environ.get("LISTEN_FDS", "")
    if not (count.isascii() and count.isdecimal()):
        return []
    return list(range(LISTEN_FDS_START, LISTEN_FDS_START + int(count)))


def default_listen(name: str) -> str:
    """The address of a unix socket in the runtime directory. Raises: NbdTargetError."""
    directory = runtime_directory()
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise NbdTargetError(f"{directory}: {error.strerror or error}") from None
    return f"unix:{directory / name}.sock"


class Daemon:
    """One server process.

    Attributes:
        registry: the mapped devices.
        uris: of the listeners, with "{name}" where an export's name goes.
        stop: set it to end the process as SIGTERM does.
    """

    def __init__(self, limits: Limits | None = None) -> None:
        self.registry = Registry(resolve)
        self.uris: list[str] = []
        self.stop = asyncio.Event()
        self._listener = Listener(self.registry, limits=limits)
        self._reload_wanted = asyncio.Event()
        self._follower: asyncio.Task[None] | None = None
        self._before_close: list[Callable[[], Awaitable[None]]] = []
        self._control: ControlServer | None = None

    async def open_control(
        self,
        address: ControlAddress,
        *,
        token: str | None = None,
        optional: bool = False,
    ) -> bool:
        """Open the control socket; with `optional`, go without it if another server has it.

        Raises: SocketInUseError; NbdTargetError: TCP without a token.
        """
        control = ControlServer(
            Verbs(self.registry, lambda: self.uris), address, token=token
        )
        try:
            await control.start()
        except SocketInUseError as error:
            if not optional:
                raise
            _log.info("no control socket: %s", error)
            return False
        self._control = control
        return True

    async def listen(self, addresses: Sequence[str], fds: Sequence[int] = ()) -> None:
        """Listen on `addresses` and on passed sockets. Raises: NbdTargetError, OSError."""
        for fd in fds:
            self.uris += await self._listener.start_fd(fd)
        for address in addresses:
            self.uris += await self._listener.start(address)

    def catch_signals(self, *, sighup_reloads: bool = False) -> None:
        """From now on the first signal sets `stop`; what follows it has its usual effect.

        With `sighup_reloads` SIGHUP does not stop: `follow_reloads` says what it does.
        """
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop_by_signal)
        if sighup_reloads:
            loop.add_signal_handler(signal.SIGHUP, self._reload_wanted.set)

    def follow_reloads(self, reload: Callable[[], Awaitable[None]]) -> None:
        """From now on call `reload` after each SIGHUP, and for one that has come already."""

        async def follow() -> None:
            while True:
                await self._reload_wanted.wait()
                self._reload_wanted.clear()
                try:
                    await reload()
                except Exception:
                    # The last line of defence: the next SIGHUP is followed all the same.
                    _log.exception("reload failed")

        self._follower = asyncio.create_task(follow())

    def before_close(self, call: Callable[[], Awaitable[None]]) -> None:
        """Have `call` called when the end begins: nothing new is to be opened any more."""
        self._before_close.append(call)

    def _stop_by_signal(self) -> None:
        self.stop.set()
        self.release_signals()

    def release_signals(self) -> None:
        """Give signals their usual effect again."""
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.remove_signal_handler(number)

    async def until_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        """Return what `work` does, or None if it had to be cancelled because of `stop`."""
        task = asyncio.create_task(work)
        stop = asyncio.create_task(self.stop.wait())
        try:
            await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                await asyncio.wait([task])
        return None if task.cancelled() else task.result()

    async def wait_for_stop(self) -> None:
        """Return when a signal has come after `catch_signals`, or `stop` is set."""
        await self.stop.wait()

    async def close(self) -> None:
        """End in the order of the module head. Durable: everything acknowledged."""
        _log.info("stopping")
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        for call in self._before_close:
            await call()
        await self._listener.close(GRACE_S_MAX)
        await self.registry.close()
        if self._control is not None:
            await self._control.close()


async def serve_until_stopped(
    options: ServeOptions, ready: Callable[[list[str]], None]
) -> None:
    """Serve until a signal comes: the devices of the configuration file, or none at first.

    `ready` is called with the URIs. Raises: NbdTargetError.
    """
    if options.config is None:
        config = None
    else:
        # Here: most servers are one clone, and need none of it.
        from nbdtarget.config.devices import ConfiguredDevices
        from nbdtarget.config.file import read
        from nbdtarget.dm.types import TARGET_TYPES

        config = read(options.config, TARGET_TYPES)
    daemon = Daemon(None if config is None else config.limits)
    fds = passed_sockets()
    addresses = options.listen or (() if config is None else config.listen)
    if not addresses and not fds:
        addresses = (default_listen("nbd"),)
    address = control_address(options.control or getattr(config, "control", None))
    token = control_token(
        options.control_token_file or getattr(config, "control_token_file", None)
    )
    daemon.catch_signals(sighup_reloads=config is not None)
    try:
        await daemon.open_control(address, token=token)
        if config is not None:
            devices = ConfiguredDevices(daemon.registry, config)
            daemon.before_close(devices.close)
            await daemon.until_stopped(devices.start())
            if daemon.stop.is_set():
                return
            daemon.follow_reloads(devices.reload_and_tell)
        await daemon.listen(addresses, fds)
        ready(daemon.uris)
        await daemon.wait_for_stop()
    finally:
        daemon.release_signals()
        await daemon.close()


def run(main: Callable[[], Awaitable[T]]) -> T:
    """Run a coroutine function to its end on a fast loop."""
    import uvloop  # here: most commands never start a loop

    async def awaited() -> T:
        return await main()

    # What has been imported stays: to look through it again took a full collection 5 ms, with
    # the loop standing still.
    gc.freeze()
    try:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(awaited())
    finally:
        gc.unfreeze()
