# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget serve`: one process with the devices of a configuration file, or with none at first."""

import asyncio
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.heap import HEAP
from nbdtarget.common.unix_socket import PRIVATE, SocketAccess, SocketOptions
from nbdtarget.config.limits import with_limits
from nbdtarget.control.paths import (
    control_address,
    make_directory,
    runtime_directory,
    socket_path,
)
from nbdtarget.control.tokens import control_tokens
from nbdtarget.daemon.activation import passed_sockets
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.handover.taker import maybe_offer
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.security import SecurityOptions, security_of
from nbdtarget.daemon.stop_bounds import StopBounds
from nbdtarget.server.limits import Limits
from nbdtarget.targets.registry import TARGET_TYPES, load_all

if TYPE_CHECKING:
    from nbdtarget.config.file import Config
    from nbdtarget.config.state import StateDirectory

__all__ = ["ServeOptions", "default_listen", "serve_until_stopped"]

STATE_VARIABLE: Final = "STATE_DIRECTORY"


class ServeOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of `serve`. No `listen`: a unix socket in the runtime directory.

    `config` is a file's path; `listen`, `control` and `stop_timeout` win over what stands there.
    `stop_timeout`: seconds, see `StopBounds.of`. `sockets`: modes, owners and groups.
    `limits`: fields of `Limits`, over those of the file. `run`: a shell command, see `ClientCommand`.
    `metrics`: where metrics are told alone, and of what.
    `state`: a directory, see `nbdtarget.config.state`.
    """

    listen: tuple[str, ...] = ()
    control: str | None = None
    control_token_file: str | None = None
    control_read_token_file: str | None = None
    config: str | None = None
    stop_timeout: float | None = None
    sockets: SocketOptions = SocketOptions()
    limits: dict[str, Any] = {}
    security: SecurityOptions = SecurityOptions()
    run: str | None = None
    metrics: MetricsOptions = MetricsOptions()
    state: str | None = None


def default_listen(name: str, access: SocketAccess = PRIVATE) -> str:
    """The address of a unix socket in the runtime directory. Raises: NbdTargetError."""
    directory = runtime_directory()
    try:
        make_directory(directory, is_shared=access.is_shared)
    except OSError as error:
        raise NbdTargetError(f"{directory}: {error.strerror or error}") from None
    return f"unix:{socket_path(directory, name)}"


async def serve_until_stopped(
    options: ServeOptions, ready: Callable[[list[str]], None]
) -> int:
    """Serve until a signal comes: the devices of the configuration file, or none at first.

    `ready` is called with the URIs. Returns the exit status: 1 if not everything could be committed.
    Raises: NbdTargetError.
    """
    config = _config_of(options)
    stop_timeout = options.stop_timeout
    if stop_timeout is None and config is not None:
        stop_timeout = config.stop_timeout
    limits = Limits() if config is None else config.limits
    daemon = Daemon(
        with_limits(limits, options.limits),
        StopBounds.of(stop_timeout),
        _sockets_of(options, config),
        security_of(options.security, config),
        metrics=_metrics_of(options, config),
        heap=HEAP,
    )
    if config is not None:
        daemon.take_helpers(config)
    passed = passed_sockets()
    addresses = options.listen or (() if config is None else config.listen)
    if not addresses and not passed.nbd:
        addresses = (default_listen("nbd", daemon.listen_access),)
    address = control_address(options.control or getattr(config, "control", None))
    tokens = control_tokens(
        options.control_token_file or getattr(config, "control_token_file", None),
        options.control_read_token_file
        or getattr(config, "control_read_token_file", None),
    )
    state = _state_of(options, config, daemon)
    daemon.catch_signals(sighup_reloads=config is not None)
    offer = maybe_offer()
    try:
        if offer is None:
            await _open_state(state, config, daemon)
            await daemon.open_control(address, tokens=tokens, passed=passed.control)
            await daemon.open_metrics(passed.metrics)
        else:
            await daemon.take_over(offer)
            try:
                await _open_state(state, config, daemon)
            except NbdTargetError as error:
                await offer.fail(error)
                raise
            await daemon.go_on(offer)
        if config is not None:
            await _follow_config(daemon, config)
        if state is not None and not daemon.stop.is_set():
            daemon.before_close(state.close)
            daemon.follow_config(state.pause, state.resume)
            await daemon.until_stopped(state.restore())
        if daemon.stop.is_set():
            return 0
        if offer is None:
            await daemon.listen(addresses, passed.nbd)
            ready(daemon.uris)
        daemon.tell_ready()
        if options.run is not None:
            await daemon.start_command(options.run)
        # Devices are made while others are served: no client may wait for an import then. The start itself need not wait.
        load_all()
        await daemon.wait_for_stop()
    finally:
        daemon.release_signals()
        await daemon.close()
    return daemon.exit_status(0 if daemon.is_committed else 1)


def _config_of(options: ServeOptions) -> "Config | None":
    """Read the configuration file, if there is one. Raises: NbdTargetError."""
    if options.config is None:
        return None
    # Here: most servers are one clone, and need none of it.
    from nbdtarget.config.file import read

    return read(options.config, TARGET_TYPES)


async def _follow_config(daemon: Daemon, config: "Config") -> None:
    """Make the devices of the file, and follow it from now on, unless the server is stopped meanwhile."""
    from nbdtarget.config.devices import ConfiguredDevices

    devices = ConfiguredDevices(daemon.registry, config, daemon.follow_rules)
    daemon.before_close(devices.close)
    await daemon.until_stopped(devices.start())
    if not daemon.stop.is_set():
        daemon.follow_reloads(devices.reload_and_tell)
        daemon.follow_config(devices.pause, devices.start)


def _sockets_of(options: ServeOptions, config: "Config | None") -> SocketOptions:
    sockets = options.sockets
    return sockets if config is None else sockets.or_else(config.sockets)


def _metrics_of(options: ServeOptions, config: "Config | None") -> MetricsOptions:
    if config is None:
        return options.metrics
    configured = MetricsOptions(config.metrics, config.metrics_devices)
    return options.metrics.or_else(configured)


def _state_of(
    options: ServeOptions, config: "Config | None", daemon: Daemon
) -> "StateDirectory | None":
    """Where devices are kept that commands make; None: nowhere.

    It is what the option says, else the configuration file, else systemd (`StateDirectory=`).
    """
    # systemd names several directories with colons between them; the first one is ours.
    given = os.environ.get(STATE_VARIABLE, "").split(":")[0]
    directory = options.state or getattr(config, "state", None) or given
    if not directory:
        return None
    from nbdtarget.config.state import StateDirectory

    return StateDirectory(directory, daemon.registry, TARGET_TYPES)


async def _open_state(
    state: "StateDirectory | None", config: "Config | None", daemon: Daemon
) -> None:
    """Raises: NbdTargetError: the directory cannot be used, and is as it was."""
    if state is not None:
        configured = () if config is None else config.devices
        where = "" if config is None else config.path
        await asyncio.to_thread(state.open, {each.name: where for each in configured})
        # Before the first client, whose `create --persist` would be refused otherwise.
        daemon.verbs.state = state
