# SPDX-License-Identifier: Apache-2.0
"""The devices of a configuration file, made in a registry and kept as the file says.

Theory of operation. `start` makes all devices, lower ones first; if one is refused, those made
so far are removed again, and the server does not start. `reload` (SIGHUP) reads the file anew,
and if it has a mistake anywhere nothing happens at all. Then:

    in the file                         what is done
    a device that does not exist        created
    its table says something else       loaded and resumed, with clients attached
      than at the last reading
    anything else                       nothing

"Else than at the last reading", not "else than what is live": a table that was changed
by command since, or that has changed itself (a clone that became linear), is left alone until the
file changes. Devices that have gone from the file stay: removing is for who knows that nobody
needs them. One device that is refused keeps what it has and does not hold up the others.
"""

import asyncio
import logging
from dataclasses import replace
from typing import Final

from nbdtarget.config.file import Config, ConfigError, DeviceConfig, read
from nbdtarget.dm.registry import Registry
from nbdtarget.errors import NbdTargetError

__all__ = ["ConfiguredDevices"]

log: Final = logging.getLogger(__name__)


class ConfiguredDevices:
    """The devices of one file in one registry."""

    def __init__(self, registry: Registry, config: Config) -> None:
        self._registry = registry
        self._config = config
        self._lock = asyncio.Lock()  # one start or reload after another

    async def start(self) -> None:
        """Make all devices, or none.

        Raises: NbdTargetError, naming the file and the device.
        """
        made: list[str] = []
        async with self._lock:
            try:
                for device in self._config.devices:
                    await self._create(device)
                    made.append(device.name)
            except NbdTargetError as error:
                for name in reversed(made):
                    await self._registry.remove(name)
                raise NbdTargetError(
                    f"{self._config.path}: device {device.name}: {error}"
                ) from error

    async def reload(self) -> dict[str, list[str]]:
        """Read the file again and follow it.

        Returns names of devices by what was done: created, loaded, refused.
        Raises: NbdTargetError: the file cannot be used, and nothing has changed.
        """
        async with self._lock:
            existing = {device.dm_name for device in self._registry.devices()}
            config = read(self._config.path, self._registry.types, existing)
            self._say_what_stays(config, existing)
            done: dict[str, list[str]] = {"created": [], "loaded": [], "refused": []}
            before = {device.name: device for device in self._config.devices}
            kept: list[DeviceConfig] = []
            for device in config.devices:
                known = before.get(device.name)
                try:
                    what = await self._follow(device, known)
                except NbdTargetError as error:
                    log.error("%s: device %s: %s", config.path, device.name, error)
                    what = "refused"
                if what:
                    done[what].append(device.name)
                if what != "refused":
                    kept.append(device)
                elif known is not None:
                    kept.append(known)  # so that the next reload tries again
            self._config = replace(self._config, devices=tuple(kept))
            return done

    async def reload_and_tell(self) -> None:
        """`reload`; whatever comes of it stands in the log."""
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

    async def _follow(self, device: DeviceConfig, known: DeviceConfig | None) -> str:
        """Do what the file wants; return what was done, "" for nothing."""
        if self._registry.maybe_device(device.name) is None:
            await self._create(device)
            return "created"
        if device.specs and (known is None or not _same(known, device)):
            await self._load(device)
            return "loaded"
        return ""

    def _say_what_stays(self, config: Config, existing: set[str]) -> None:
        before, path = self._config, config.path
        gone = {device.name for device in before.devices} & existing
        for name in sorted(gone - {device.name for device in config.devices}):
            log.warning("%s: device %s has gone from it: left", path, name)
        for key in ("listen", "control", "control_token_file", "limits"):
            if getattr(config, key) != getattr(before, key):
                log.warning("%s: `%s' changes with a restart", path, key)

    async def _create(self, device: DeviceConfig) -> None:
        await self._registry.create(
            device.name,
            device.table if device.specs else None,
            uuid=device.uuid,
            directory=self._config.directory,
            read_only=device.read_only,
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
