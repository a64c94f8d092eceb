# SPDX-License-Identifier: Apache-2.0
"""The server process: it has a registry, an NBD listener and a control socket.

Theory of operation. Everything runs on one event loop. `Daemon` starts the three, and ends
them in the order in which nothing is lost:

    1. the listener stops accepting; requests in flight are carried out and answered
    2. every mapped device is suspended, which commits, and removed, upper ones first, those that do not
       stand on each other side by side
    3. the control socket goes: until here `status` still answers

SIGTERM, SIGINT and SIGHUP (the terminal is closed) begin this. After the first of them
the signals have their usual effect again: a second one ends the process at once. The disks are then
as a power cut would leave them: no acknowledged data is lost.

One signal is enough, also if a disk or a server hangs (`nbdtarget.daemon.stop_bounds`; seconds from the signal, with the defaults):

    10   reads of devices that are only read and do not answer are given up: nothing can be lost by it.
         Their clients get EIO; a second later the connections that are still there are closed
    30   what still does not end is logged, device by device. Everything else is committed by now. Of
         devices that hang, whatever can still be committed is committed: each device is flushed by itself
    60   the process ends. It ends sooner, as soon as no commit is under way any more

Threads that hang then are not waited for: a thread in a system call on a dead mount cannot be ended, so the
process is left by `os._exit` (`nbdtarget.daemon.process`). The exit status is 0 if everything was committed all the same.

Without a configuration file, a SIGHUP that was sent on purpose makes the server read its certificates again (`_hung_up`). With a configuration file, SIGHUP makes the server read that file again (`nbdtarget.config.devices`). A SIGHUP that comes
while the server starts, or while it follows the file, is carried out afterwards, and several of them
only once.

A server can hand over to a new process of the same program (`upgrade`, `nbdtarget.daemon.handover`). It does not go through
the end then: the new process has everything, and this one is left at once.

Sockets that were passed (`nbdtarget.daemon.activation`) are served beside those that were asked for. The service manager is
told what happens (`nbdtarget.daemon.notify`). A command that was given with `--run` is ended before everything else
(`nbdtarget.daemon.client_command`).
"""

import asyncio
import errno as errnos
import logging
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from msgspec.structs import replace

from nbdtarget.common.clock import sleep, wait_within
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.heap import LEFT_ALONE, Heap
from nbdtarget.common.turns import log_failure
from nbdtarget.common.unix_socket import (
    SocketOptions,
    remove_if_stale,
)
from nbdtarget.control.api import ControlServer
from nbdtarget.control.paths import (
    ControlAddress,
    control_address,
    known_controls,
)
from nbdtarget.control.tokens import NO_TOKENS, ControlTokens
from nbdtarget.control.verbs import Verbs
from nbdtarget.daemon.client_command import ClientCommand
from nbdtarget.daemon.handover.giver import hand_over
from nbdtarget.daemon.handover.messages import Moved
from nbdtarget.daemon.handover.taker import Offer
from nbdtarget.daemon.metrics_options import NO_METRICS, MetricsOptions
from nbdtarget.daemon.notify import Notifier
from nbdtarget.daemon.process import note_what_hangs
from nbdtarget.daemon.security import Security
from nbdtarget.daemon.service_reports import ServiceReports, status_line
from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.daemon.terminal import has_terminal
from nbdtarget.devices import resolve
from nbdtarget.devices.helper.configured import set_helper_commands
from nbdtarget.devices.http.url_command import set_url_commands
from nbdtarget.dm.handover import Parking, let_go, refusals, unpark
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.dm.registry import Registry
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener, export_uri

if TYPE_CHECKING:
    from nbdtarget.config.file import Config

__all__ = ["Daemon"]

log = logging.getLogger(__name__)

GIVE_UP_PERIOD_S: Final = 0.5
CONTROL_S_MAX: Final = 3.0
CANCEL_S_MAX: Final = 5.0
# The service manager hears that we are alive every so often, and waits for so long.
EXTEND_PERIOD_S: Final = 10.0
EXTEND_S: Final = 30.0
ANSWER_S: Final = 0.2
STOP_SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)

T = TypeVar("T")


class Daemon:
    """One server process.

    Attributes:
        registry: the mapped devices.
        uris: of the listeners, with "{name}" where an export's name goes.
        stop: set it to end the process as SIGTERM does.
        notifier: tells the service manager.
        listen_access: which users may connect to NBD sockets.
        is_committed: after `close`: whether everything that had ended is committed.
        plan: says what a job needs in another process, see `Moved`. It is called before anything is paused, when it may raise, and again when all is at rest.
        reopened: called when a hand-over has failed, the devices are open here again, and clients do not go on yet; and once more
            for each device that comes open later.
        has_handed_over: another process has everything, and this one must not touch it.
        security: certificates, and who may attach to what.
        verbs: what the control socket answers with.
        monitor: has the figures of the server.
    """

    def __init__(
        self,
        limits: Limits | None = None,
        bounds: StopBounds | None = None,
        sockets: SocketOptions | None = None,
        security: Security | None = None,
        notifier: Notifier | None = None,
        metrics: MetricsOptions = NO_METRICS,
        heap: Heap = LEFT_ALONE,
    ) -> None:
        """Args: heap: is trimmed when clients have ended; for a process that is ours.

        Raises: NbdTargetError: `metrics` is no address, `sockets` has a mode, an owner or a group that is none.
        """
        self.registry = Registry(resolve)
        self.notifier = notifier or Notifier()
        self.is_committed = True
        self._bounds = bounds or StopBounds()
        self.uris: list[str] = []
        self.stop = asyncio.Event()
        sockets = sockets or SocketOptions()
        self.listen_access = sockets.listen
        self._control_access = sockets.control
        self.security = security or Security()
        self.security.disks = self.registry.open_disks
        self._listener = Listener(
            self.registry,
            limits=limits,
            access=self.listen_access,
            tls=self.security.tls,
            rules=self.security.rules,
            heap=heap,
        )
        self._reports = ServiceReports(
            self.notifier,
            lambda: status_line(self.registry.devices(), self._listener.nr_connections),
        )
        self._expiry: asyncio.Task[None] | None = None
        self._reload_wanted = asyncio.Event()
        self._has_terminal = False  # at the start
        self._follower: asyncio.Task[None] | None = None
        self._before_close: list[Callable[[], Awaitable[None]]] = []
        self._control: ControlServer | None = None
        self._command: ClientCommand | None = None
        self._has_served = True
        self.verbs = Verbs(
            self.registry,
            lambda: self.uris,
            self.upgrade,
            self.security.rules,
            self.security.certificates,
        )
        self.verbs.monitor = self.monitor = Observer(
            self.registry, self._listener, self.security.certificates
        )
        self.monitor.has_device_metrics = metrics.tells_of_devices
        self._metrics_address = metrics.where
        self._metrics: ControlServer | None = None
        self._upgrading: asyncio.Task[int] | None = None
        # The follower of the configuration file: how to pause it before a hand-over, and how to go on.
        self._followed: list[
            tuple[Callable[[], Awaitable[None]], Callable[[], Awaitable[None]]]
        ] = []
        self._moved: Moved | None = None
        self._heir: subprocess.Popen[bytes] | None = None
        self.plan: Callable[[], bytes] = bytes
        self.reopened: Callable[[], None] = _do_nothing
        self.registry.reopenings.opened = lambda: self.reopened()
        self.has_handed_over = False

    async def open_control(
        self,
        address: ControlAddress,
        *,
        tokens: ControlTokens = NO_TOKENS,
        passed: int | None = None,
    ) -> None:
        """Open the control socket; those that killed servers have left behind are removed.

        Args: passed: a listening socket that is used instead of `address`.
        Raises: SocketInUseError, NoSocketError; NbdTargetError: TCP without a token.
        """
        self.monitor.start()
        for path in known_controls():
            remove_if_stale(str(path))
        control = ControlServer(
            self.verbs,
            address,
            tokens=tokens,
            access=self._control_access,
        )
        if passed is None:
            await control.start()
        else:
            control.start_passed(passed)
        self._control = control

    async def open_metrics(self, passed: int | None = None) -> None:
        """Serve metrics, and nothing else, on a listening socket that was passed, else at their address, if they have one.

        Raises: SocketInUseError, NoSocketError, ListenError.
        """
        if passed is not None:
            if self._metrics_address is not None:
                log.warning(
                    "metrics are on the socket that was passed, and not on %s",
                    self._metrics_address,
                )
            metrics = self._metrics_server(Path())
            metrics.start_passed(passed)
        elif self._metrics_address is not None:
            metrics = self._metrics_server(self._metrics_address)
            await metrics.start()
        else:
            return
        self._metrics = metrics

    def _metrics_server(self, address: ControlAddress) -> ControlServer:
        access = self._control_access
        return ControlServer(self.verbs, address, access=access, has_verbs=False)

    def _http_servers(self) -> list[ControlServer]:
        servers = self._control, self._metrics
        return [server for server in servers if server is not None]

    async def listen(self, addresses: Sequence[str], fds: Sequence[int] = ()) -> None:
        """Listen on `addresses` and on passed sockets. Raises: NbdTargetError, OSError."""
        for fd in fds:
            self.uris += await self._listener.start_fd(fd)
        for address in addresses:
            tls = self.security.of(address)
            self.uris += await self._listener.start(address, tls)
        self._warn_of_openness()
        if self._expiry is None:
            self._expiry = self.security.start_watching()

    def _warn_of_openness(self) -> None:
        self.security.warn_of_openness(self._listener.public_addresses())

    # ---- from one process to another ----

    def follow_config(
        self,
        pause: Callable[[], Awaitable[None]],
        resume: Callable[[], Awaitable[None]],
    ) -> None:
        """Have `pause` called before a hand-over, and `resume` if it fails.

        Only the `pause` of the first call may raise: the hand-over is not begun then.
        """
        self._followed.append((pause, resume))

    async def upgrade(self) -> int:
        """Start this program again, and hand over to it. Returns its process number.

        Raises: NbdTargetError: everything goes on here.
        """
        if self._upgrading is not None or self.stop.is_set():
            raise TableError(
                "Device or resource busy: the server is stopping or handing over",
                errnos.EBUSY,
            )
        self._upgrading = asyncio.create_task(self._hand_over())
        try:
            return await asyncio.shield(self._upgrading)
        finally:
            if not self.has_handed_over:
                self._upgrading = None

    async def _hand_over(self) -> int:
        if self._command is not None:
            raise TableError(
                "the command of --run waits for this process", errnos.EBUSY
            )
        if reasons := refusals(self.registry):
            raise TableError("; ".join(reasons), errnos.EBUSY)
        if waiting := self._waiting():
            raise TableError(waiting, errnos.EBUSY)
        self.plan()  # raises if there is none any more: nothing is paused yet
        for pause, _ in self._followed:
            await pause()
        self.notifier.reloading("handing over to a new process")
        try:
            heir = await hand_over(self, [sys.executable, *sys.orig_argv[1:]])
        except BaseException as error:
            # Also when a signal to stop has cancelled it: what was paused goes on until the stop.
            log.error("not handed over: %s", str(error) or _why(error))
            for _, resume in self._followed:
                await resume()
            self.tell_ready()
            raise
        self.has_handed_over, self._heir = True, heir
        self.notifier.main_process(heir.pid)
        self.stop.set()
        return heir.pid

    def _waiting(self) -> str:
        """Say which device is suspended while requests of clients wait in it; "": none is."""
        found: dict[MappedDevice, list[str]] = {}
        for client in self._listener.clients():
            device = client.device
            is_suspended = (
                isinstance(device, MappedDevice) and device.state is State.SUSPENDED
            )
            if client.in_flight and is_suspended:
                assert isinstance(device, MappedDevice)
                found.setdefault(device, []).append(client.peer)
        return "; ".join(
            f"device {device.dm_name} is suspended, and requests of {', '.join(peers)}"
            " wait in it: resume it first"
            for device, peers in found.items()
        )

    async def freeze(self, within_s: float) -> list[str]:
        """Hold back verbs and requests. Returns the clients whose requests have not ended in time.

        Raises: TableError: some wait in a suspended device, and will not end.
        """
        self.verbs.held = "the server is handing over to a new process"
        for server in self._http_servers():
            await server.pause()
        busy = await self._listener.freeze(within_s, lambda: bool(self._waiting()))
        if busy and (waiting := self._waiting()):
            raise TableError(waiting, errnos.EBUSY)
        return busy

    async def thaw(self) -> None:
        """Undo `freeze`."""
        self.reopened()
        self._listener.thaw()
        for server in self._http_servers():
            await server.resume()
        self.verbs.held = ""

    def parking(self) -> Parking:
        return Parking(self.registry)

    def moved(self, parking: Parking) -> tuple[Moved, list[int]]:
        """Everything that another process needs, and the descriptors: the control socket's first."""
        assert self._control is not None
        path, fds = self._control.moved()
        listener, more = self._listener.moved_state()
        address = self._control.address
        rules, kept_rules = self.security.rules.texts()
        moved = Moved(
            devices=tuple(parking.states),
            listener=listener,
            control=str(address),
            control_path=path,
            tokens=self._control.tokens,
            has_device_metrics=self.monitor.has_device_metrics,
            plan=self.plan(),
            rules=rules,
            kept_rules=kept_rules,
        )
        if self._metrics is not None:
            metrics_path, metrics_fds = self._metrics.moved()
            more = metrics_fds + more
            moved = replace(
                moved,
                metrics=str(self._metrics.address),
                metrics_path=metrics_path,
            )
        return moved, fds + more

    async def take_over(self, offer: Offer) -> Moved:
        """Open what another process has handed over. I/O and clients wait until `go_on`.

        Raises: NbdTargetError: the other process goes on, and this one ends without touching anything.
        """
        self.has_handed_over = True  # to the other process, until `go_on`
        try:
            return await self._take_over(offer)
        except NbdTargetError as error:
            await offer.fail(error)
            raise

    async def _take_over(self, offer: Offer) -> Moved:
        moved, fds = await offer.receive()
        self.monitor.has_device_metrics = moved.has_device_metrics
        self.monitor.start()
        control = ControlServer(
            self.verbs,
            control_address(moved.control),
            tokens=moved.tokens,
            access=self._control_access,
        )
        has_lock = moved.control_path is not None
        sock, lock = control.take_descriptors(fds, has_lock=has_lock)
        control.take_over(sock, control.address, lock)
        self._control = control
        if moved.metrics:
            metrics = self._metrics_server(control_address(moved.metrics))
            has_lock = moved.metrics_path is not None
            sock, lock = metrics.take_descriptors(fds, has_lock=has_lock)
            metrics.take_over(sock, metrics.address, lock)
            self._metrics = metrics
        self.security.rules.take_texts(moved.rules, moved.kept_rules)
        security = self.security
        self.uris = self._listener.take_over(moved.listener, fds, security.taken_over)
        self._expiry = self.security.start_watching()
        await unpark(self.registry, moved.devices)
        self._moved = moved
        return moved

    async def go_on(self, offer: Offer) -> None:
        """Wait until the other process has let go; then serve what was taken over.

        Raises: ChannelError: the other process goes on, and this one ends without touching anything.
        """
        assert self._moved is not None
        await offer.prepared()
        self.has_handed_over = False
        await let_go(self.registry, self._moved.devices)
        self._warn_of_openness()
        self._listener.go_on()
        for server in self._http_servers():
            await server.resume()
        self._moved = None

    async def start_command(self, line: str, name: str = "") -> None:
        """Start a shell command that finds the export `name` in its environment; `stop` is set when it ends.

        Raises: NbdTargetError.
        """
        assert self._command is None
        self._command = ClientCommand(line, self.stop.set)
        await self._command.start(export_uri(self.uris[0], name), name)

    def exit_status(self, status: int) -> int:
        """Return the status of the command of `start_command`, if that has failed; else `status`."""
        command = self._command
        return status if command is None else command.status or status

    def catch_signals(self, *, sighup_reloads: bool = False) -> None:
        """From now on the first signal sets `stop`; what follows it has its usual effect.

        With `sighup_reloads` SIGHUP does not stop: `follow_reloads` says what it does. Without, a SIGHUP that does not come of the
        end of the terminal has certificates read again, if there are some.
        """
        loop = asyncio.get_running_loop()
        for number in STOP_SIGNALS:
            loop.add_signal_handler(number, self._stop_by_signal)
        self._has_terminal = has_terminal()
        hung_up = self._reload_wanted.set if sighup_reloads else self._hung_up
        loop.add_signal_handler(signal.SIGHUP, hung_up)

    def follow_reloads(self, reload: Callable[[], Awaitable[None]]) -> None:
        """From now on call `reload` after each SIGHUP, and for one that has come already."""

        async def follow() -> None:
            while True:
                await self._reload_wanted.wait()
                self._reload_wanted.clear()
                self.notifier.reloading()
                try:
                    await reload()
                except Exception:
                    # The last line of defence: the next SIGHUP is followed all the same.
                    log.exception("reload failed")
                self.tell_ready()

        self._follower = asyncio.create_task(follow())

    def follow_rules(self, config: "Config") -> None:
        """A file was read again: take its rules, certificates and helpers, for what is to come."""
        served = {device.dm_name for device in self.registry.devices()}
        unnamed = served - {device.name for device in config.devices}
        self.security.set_rules(config.access, config.access_by_export, unnamed)
        self.security.reload()
        self.take_helpers(config)

    def take_helpers(self, config: "Config") -> None:
        """Take what a file says about programs that open disks, for disks that are opened from now on."""
        set_helper_commands(config.helpers)
        set_url_commands(config.url_commands)
        self.verbs.tcp_starts_programs = config.control_starts_programs

    def tell_ready(self) -> None:
        """Tell the service manager that clients may come, and what is served."""
        self._reports.ready()

    def before_close(self, call: Callable[[], Awaitable[None]]) -> None:
        """Have `call` called when the end begins: nothing new is to be opened any more."""
        self._before_close.append(call)

    def _hung_up(self) -> None:
        """Without a configuration file, SIGHUP comes when the terminal is closed, or was sent after a certificate was renewed."""
        is_closed = self._has_terminal and not has_terminal()
        if self.security.has_certificates and not is_closed:
            if self.security.reload():
                log.info("SIGHUP: the certificates were read again")
            return
        log.warning("SIGHUP: the server stops; with --config it reads its file again")
        self._stop_by_signal()

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
            async with self._patient():
                await asyncio.wait([task, stop], return_when=asyncio.FIRST_COMPLETED)
        finally:
            stop.cancel()
            if not task.done():
                task.cancel()
                total_s = self._bounds.total_s
                bound_s = None if total_s is None else total_s + CANCEL_S_MAX
                await wait_within([task], bound_s)
        if not task.done():
            log.error("the start does not end, and is not waited for")
            note_what_hangs("start")
            return None
        return None if task.cancelled() else task.result()

    @asynccontextmanager
    async def _patient(self) -> AsyncIterator[None]:
        """Meanwhile the service manager hears that we are alive."""

        async def extend() -> None:
            while True:
                self.notifier.extend(EXTEND_S)
                await sleep(EXTEND_PERIOD_S)

        task = asyncio.create_task(extend())
        log_failure(task, "asking the service manager for more time")
        try:
            yield
        finally:
            task.cancel()

    async def wait_for_stop(self) -> None:
        """Return when a signal has come after `catch_signals`, or `stop` is set."""
        await self.stop.wait()

    async def stop_when_empty(self) -> None:
        """Set `stop` when commands have removed the last device."""
        await self.registry.until_empty()
        log.warning("the last device was removed, and none is left to serve")
        self.stop.set()

    async def close(self, *, has_served: bool = True) -> None:
        """End in the order, and within the bounds, of the module head.

        Args: has_served: clients may have written, so that something may be lost.
        Durable: everything acknowledged; everything that had ended, if `is_committed` afterwards.
        """
        if self._upgrading is not None and not self.has_handed_over:
            # The signal to stop came meanwhile.
            self._upgrading.cancel()
            await asyncio.wait([self._upgrading])
        await self._reports.stop()
        if self.has_handed_over:
            self._listener.forget()
            await sleep(ANSWER_S)  # the client that has asked for it gets its answer
            note_what_hangs("handed over")
            return
        log.info("stopping")
        self._has_served = has_served
        self.notifier.stopping()
        ending = asyncio.create_task(self._end_in_order())
        give_up = asyncio.create_task(self._give_up_reads())
        log_failure(give_up, "giving up reads that hang")
        async with self._patient():
            done = await wait_within([ending], self._bounds.devices_s)
            give_up.cancel()
            if not done:
                await self._commit_what_answers()
        if ending.done():
            ending.result()
        else:
            await self._leave()

    async def _give_up_reads(self) -> None:
        """Again and again: a clone goes on copying until it is its turn to be suspended."""
        await sleep(self._bounds.requests_s)
        while True:
            self.registry.give_up_reads()
            await sleep(GIVE_UP_PERIOD_S)

    async def _end_in_order(self) -> None:
        for task in (self._follower, self._expiry):
            if task is not None:
                task.cancel()
                await asyncio.wait([task])
        if self._command is not None:
            await self._command.end()
        for call in self._before_close:
            await call()
        await self._listener.close(self._bounds.connections_s)
        self._say_uncommitted(await self.registry.close())
        self.monitor.stop()
        for server in self._http_servers():
            await server.close()

    def _say_uncommitted(self, names: list[str]) -> None:
        self.is_committed = not names
        for name in names if self._has_served else ():
            log.error(
                "%s: could not be committed: writes that no FLUSH has covered may be lost",
                name,
            )

    async def _commit_what_answers(self) -> None:
        registry, bounds = self.registry, self._bounds
        assert bounds.total_s is not None
        assert bounds.devices_s is not None
        for line in registry.hanging():
            log.error("%s", line)
        registry.give_up_reads()
        rest_s = bounds.total_s - bounds.devices_s
        self._say_uncommitted(await registry.commit_what_answers(rest_s))

    async def _leave(self) -> None:
        """Something still hangs, and is not waited for: the process is to be left at once."""
        hanging = self.registry.hanging()
        note_what_hangs(*(hanging or ["stop"]))
        log.error("leaving without waiting for: %s", "; ".join(hanging) or "the rest")
        if self._control is not None:
            closing = asyncio.create_task(self._control.close())
            await wait_within([closing], CONTROL_S_MAX)


def _why(error: BaseException) -> str:
    """Return why a hand-over has ended with an exception that has no words."""
    if isinstance(error, asyncio.CancelledError):
        return "the server stops"
    return type(error).__name__


def _do_nothing() -> None:
    """Do nothing: there is no job that has to be told."""
