# SPDX-License-Identifier: Apache-2.0
"""The devices of a configuration file, made in a registry and kept as the file says.

Theory of operation. `start` opens all devices, each as soon as those that it stands on are open. One
that cannot be opened (it is missing, its server is not up yet, its metadata is damaged) does not
hold up the others: it is shown as failed, and tried again until it is open (`Opening`). `start` does not
wait for it for longer than START_S_MAX either. `reload` (SIGHUP) reads the file anew, and if it has a
mistake anywhere nothing happens at all. Then:

    in the file                         what is done
    a device that does not exist        created, or tried again and again as at the start
    one that is not open yet            tried at once, as the file says it now
    its table says something else       loaded and resumed, with clients attached
      than at the last reading
    `rotational` says something else    told to clients that connect from now on
    `access`, here or for all devices   holds for clients that connect from now on; certificates are read again, too
    anything else                       nothing

The file is compared with what it said at the last reading, and not with the live table. So a table that was
changed by command since, or that has changed itself (a clone that became linear), is left alone until the
file changes; the log says so. A device that is no longer in the file is still served, to the same clients, until a person
removes it. A device whose new table is refused keeps the old one and does not hold up the others.
"""

import asyncio
import logging
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import replace
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.config.file import Config, ConfigError, DeviceConfig, read
from nbdtarget.config.openings import Opening, refusal
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry

__all__ = ["START_S_MAX", "ConfiguredDevices"]

# How long a start, or a reload, waits for devices that take their time to open; they go on alone.
START_S_MAX: Final = 5.0

log: Final = logging.getLogger(__name__)


class ConfiguredDevices:
    """The devices of one file in one registry."""

    def __init__(
        self,
        registry: Registry,
        config: Config,
        was_read: Callable[[Config], None] = lambda _: None,
    ) -> None:
        """`was_read` is called at each reload with a file that has no mistake, before any device is opened."""
        self._was_read = was_read
        self._registry = registry
        self._config = config
        self._at_start = config  # what holds until the end of what `_fixed` returns
        self._lock = asyncio.Lock()  # one start or reload after another
        self._openings: dict[str, Opening] = {}

    async def start(self) -> None:
        """Open all devices that are not there; those that cannot be opened go on being tried."""
        async with self._lock:
            await self._open(
                [each for each in self._config.devices if self._is_to_open(each)]
            )

    async def pause(self) -> None:
        """Follow the file, so that another process reads what this one has read, and try no more to open anything.

        `start` undoes it. Raises: NbdTargetError: the file cannot be used, and nothing has changed.
        """
        await self.reload()
        async with self._lock:
            await self.close()

    async def close(self) -> None:
        """Try no more to open what is not open."""
        for opening in list(self._openings.values()):
            await opening.stop()
        self._openings.clear()

    async def reload(self) -> dict[str, list[str]]:
        """Read the file again and follow it.

        Returns names of devices by what was done: created, loaded, refused.
        Raises: NbdTargetError: the file cannot be used, and nothing has changed.
        """
        async with self._lock:
            existing = {device.dm_name for device in self._registry.devices()}
            config = read(self._config.path, self._registry.types, existing)
            self._say_what_stays(config, existing)
            self._was_read(config)
            self._registry.reopenings.try_now()
            before = {device.name: device for device in self._config.devices}
            await self._forget(before.keys() - {each.name for each in config.devices})
            self._config = config
            done: dict[str, list[str]] = {"created": [], "loaded": [], "refused": []}
            new = [each for each in config.devices if self._is_to_open(each)]
            for opening in await self._open(new):
                what = "created" if opening.is_open else "refused"
                done[what].append(opening.device.name)
            kept: list[DeviceConfig] = []
            for device in config.devices:
                known = before.get(device.name)
                if device not in new and not await self._follow(device, known, done):
                    if known is not None and self._serves(device.name):
                        kept.append(known)  # so that the next reload tries again
                    continue
                kept.append(device)
            self._config = replace(config, devices=tuple(kept))
            return done

    async def reload_and_tell(self) -> None:
        """`reload`, with its result, or why it could not be done, in the log."""
        try:
            done = await self.reload()
        except ConfigError as error:
            for line in error.lines():
                log.error("%s", line)
            log.error("not reloaded: nothing has changed")
        except NbdTargetError as error:
            log.error("not reloaded: %s", error)
        else:
            told = [
                f"{', '.join(names)} {what}" for what, names in done.items() if names
            ]
            log.warning("reloaded: %s", "; ".join(told) or "nothing has changed")

    # ---- devices that are not open yet ----

    def _is_to_open(self, device: DeviceConfig) -> bool:
        return (
            device.name in self._openings
            or self._registry.maybe_device(device.name) is None
        )

    async def _open(self, devices: Iterable[DeviceConfig]) -> list[Opening]:
        """Begin to open, or try again, and wait a while; lower devices come first."""
        begun = []
        for device in devices:
            opening = self._openings.get(device.name)
            if opening is not None and opening.device == device:
                opening.try_now()
            else:
                await self._forget([device.name])
                opening = self._openings[device.name] = self._opening_of(device)
                await opening.start()
            begun.append(opening)
        with suppress(TimeoutError):
            async with timeout(START_S_MAX):
                for opening in begun:
                    await opening.tried.wait()
        return begun

    def _opening_of(self, device: DeviceConfig) -> Opening:
        return Opening(
            self._registry,
            device,
            path=self._config.path,
            directory=self._config.directory,
            lower=[
                self._openings[name]
                for name in device.stands_on()
                if name in self._openings
            ],
            ended=self._opened,
        )

    def _opened(self, opening: Opening) -> None:
        """Forget an opening that has ended. Devices that stand on this device need not wait any longer."""
        name = opening.device.name
        if self._openings.get(name) is opening:
            del self._openings[name]
        for other in self._openings.values():
            if name in other.device.stands_on():
                other.try_now()

    async def _forget(self, names: Iterable[str]) -> None:
        """Give up devices that are not in the file any more and were never open."""
        for name in names:
            if opening := self._openings.pop(name, None):
                await opening.stop()

    # ---- devices that are open ----

    async def _follow(
        self,
        device: DeviceConfig,
        known: DeviceConfig | None,
        done: dict[str, list[str]],
    ) -> bool:
        """Load what the file says, if it says something new. False: it was refused."""
        if known is None or known.rotational != device.rotational:
            # It takes no table: clients are told when they connect.
            self._registry.get(device.name).said_rotational = device.rotational
        if not device.specs or (known is not None and _same(known, device)):
            self._say_if_changed_since(device)
            return True
        try:
            await self._load(device)
        except NbdTargetError as error:
            reason = refusal(error, device)
            log.error("%s: device %s: %s", self._config.path, device.name, reason)
            done["refused"].append(device.name)
            return False
        done["loaded"].append(device.name)
        return True

    def _say_if_changed_since(self, device: DeviceConfig) -> None:
        """The file says what it said, but the live table may have been changed by `uncache`, for example."""
        table = self._registry.get(device.name).active
        if not device.specs or table is None:
            return
        live = [(each.begin, each.length, each.type_name) for each in table.targets]
        if live != [(each.begin, each.length, each.type_name) for each in device.specs]:
            log.warning(
                "device %s: its table has been changed since it was loaded from %s, which a"
                " restart would load again; `nbdtarget table --config' prints the present one",
                device.name,
                self._config.path,
            )

    def _serves(self, name: str) -> bool:
        """Whether the device runs with the table that it had: if not, any text must be loaded."""
        device = self._registry.maybe_device(name)
        return device is not None and device.state is State.ACTIVE

    def _say_what_stays(self, config: Config, existing: set[str]) -> None:
        before, path = self._config, config.path
        gone = {device.name for device in before.devices} & existing
        gone -= self._openings.keys()
        for name in sorted(gone - {device.name for device in config.devices}):
            log.warning(
                "device %s is no longer in %s; it is still served: `nbdtarget remove %s'"
                " removes it",
                name,
                path,
                name,
            )
        now, then = _fixed(config), _fixed(self._at_start)
        changed = [key for key in now if now[key] != then[key]]
        for key in changed:
            log.warning(
                "%s: `%s' has changed; restart the server to apply it", path, key
            )

    async def _load(self, device: DeviceConfig) -> None:
        await self._registry.load(
            device.name,
            device.table,
            directory=self._config.directory,
            read_only=device.read_only,
        )
        try:
            await self._registry.resume(device.name)
        except NbdTargetError:
            await self._registry.clear(device.name)
            raise


def _same(one: DeviceConfig, other: DeviceConfig) -> bool:
    return one.specs == other.specs and one.read_only == other.read_only


def _fixed(config: Config) -> dict[str, object]:
    """Return what is taken from a file only at the start, by its keys."""
    keys = ["control", "control_token_file", "control_read_token_file"]
    keys += ["stop_timeout", "limits", "metrics", "metrics_devices", "state"]
    fixed: dict[str, object] = {key: getattr(config, key) for key in keys}
    tls = config.tls
    return {
        "listen": (config.listen, config.listen_tls),
        "tls": tls.mode,
        "tls_certificates": tls.certificates,
        "tls_verify_peer": tls.verify_peer,
        "tls_psk": tls.psk,
        **config.sockets._asdict(),
        **fixed,
    }
