# SPDX-License-Identifier: Apache-2.0
"""The disks that the crash machine drives: each target in a real registry, on crash devices."""

import contextlib
import errno
import random
from typing import Final

from bitarray import bitarray

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.permissions import OVERWRITE
from nbdtarget.devices.base import Device
from nbdtarget.dm.open_devices import DeviceOpener
from nbdtarget.dm.registry import Registry
from nbdtarget.dm.table import Table
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.metadata_io import run
from nbdtarget.targets.powercut.volatile_cache import BORDERS
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import NotFormatted
from tests.support.clock import SimClock
from tests.support.crash.images import worn_metadata
from tests.support.crash.invariants import CloneInvariants, Invariants
from tests.support.devices import CrashDevice
from tests.support.metadata.report import check
from tests.support.model import SECTOR, DiskModel

__all__ = [
    "CONTENT",
    "DISK_SIZE",
    "REGION_SIZE",
    "CloneRig",
    "DeviceTable",
    "LinearRig",
    "QuietCloneRig",
    "WornCloneRig",
    "source_content",
]

REGION_SIZE: Final = 8 * SECTOR
# Seven whole regions, and a short one at the end.
DISK_SIZE: Final = 7 * REGION_SIZE + 3 * SECTOR


def source_content(size: int = DISK_SIZE) -> bytes:
    """Return the content of the source: noise, but region 2 and the end of region 5 are holes."""
    content = bytearray(random.Random(1).randbytes(size))
    content[2 * REGION_SIZE : 3 * REGION_SIZE] = bytes(REGION_SIZE)
    content[5 * REGION_SIZE + 4 * SECTOR : 6 * REGION_SIZE] = bytes(4 * SECTOR)
    return bytes(content)


CONTENT: Final = source_content()


class DeviceTable:
    """A `DeviceOpener` that knows devices by name, and closes none of them."""

    def __init__(self, devices: dict[str, Device]) -> None:
        self.devices = devices

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        device = self.devices.get(name)
        if device is None:
            raise ResolveError(name, "No such file or directory", errno.ENOENT)
        return device

    async def create_device(self, name: str, size: int) -> Device:
        raise ResolveError(name, "cannot be created here", errno.EPERM)

    def may_create(self, name: str) -> bool:
        return False

    def identity(self, name: str) -> str:
        return name

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing is created here")


class _RegistryRig:
    """One mapped device `d` in a registry of its own."""

    table: str
    devices: dict[str, Device]
    content = CONTENT
    discards_last = False
    messages: tuple[tuple[str, ...], ...] = ()
    invariants: Invariants

    def __init__(self) -> None:
        self.clock = SimClock()
        self.registry: Registry | None = None

    async def start(self) -> None:
        self.registry = Registry(self.opener(), clock=self.clock)
        self.disk: Device = await self.registry.create("d", None)
        await self.load()
        await self.resume()

    def opener(self) -> DeviceOpener:
        """Return the opener for the registry."""
        return DeviceTable(self.devices)

    async def suspend(self) -> None:
        await self._registry.suspend("d")

    async def resume(self) -> None:
        await self._registry.resume("d")

    async def load(self) -> None:
        # The disks hold what the model says, and their metadata is blank.
        await self._registry.load("d", self.table, permissions=frozenset((OVERWRITE,)))

    async def message(self, *words: str) -> None:
        await self._registry.get("d").message(0, words)

    async def set_background(self, *, on: bool) -> None:
        """Do nothing: this target has no background work."""

    async def status(self) -> str:
        return (await self._registry.get("d").status())[0][3]

    async def stop(self) -> None:
        registry, self.registry = self._registry, None
        await registry.close()

    @property
    def _registry(self) -> Registry:
        assert self.registry is not None
        return self.registry


class LinearRig(_RegistryRig):
    """The machine's own check: a table that adds nothing to a crash device."""

    table = f"0 {DISK_SIZE // SECTOR} linear /disk 0"

    def __init__(
        self, seed: int, inline: float, images: tuple[bytes, ...] = (CONTENT,)
    ) -> None:
        super().__init__()
        self.device = CrashDevice(
            DISK_SIZE,
            seed,
            content=images[0],
            inline_chance=inline,
            name="/disk",
            border=_border(seed),
        )
        self.devices = {"/disk": self.device}
        self.at_risk = (self.device,)
        self.invariants = Invariants()

    def reboot(self, seed: int, images: tuple[bytes, ...]) -> "LinearRig":
        return type(self)(seed, self.device.inline_chance, images)

    async def check(self) -> None:
        """linear keeps nothing that could be wrong."""

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        model.check_survivor(self.device.image())

    @property
    def is_settled(self) -> bool:
        return True


class CloneRig(_RegistryRig):
    """A clone: the source never changes; destination and metadata lose power together."""

    features = "0"

    messages: tuple[tuple[str, ...], ...] = (
        ("enable_hydration",),
        ("disable_hydration",),
        ("hydration_threshold", "4"),
        ("hydration_threshold", "0"),
        ("hydration_batch_size", "3"),
        ("enable_hydrate_on_read",),
        ("disable_hydrate_on_read",),
        ("hydration_rate", "100000"),
        ("hydration_rate", "0"),
        ("then_linear",),
    )

    def __init__(
        self,
        seed: int,
        inline: float,
        images: tuple[bytes, ...] | None = None,
        *,
        before: CloneInvariants | None = None,
    ) -> None:
        """`images`: of destination and metadata; else garbage, and nothing."""
        super().__init__()
        self.table = (
            f"0 {len(self.content) // SECTOR} clone /metadata /destination /source"
            f" {REGION_SIZE // SECTOR} {self.features}"
            " 4 hydration_threshold 2 hydration_batch_size 2"
        )
        destination, metadata = images or (
            random.Random(seed).randbytes(len(self.content)),
            # The smallest that works: compactions come early.
            bytes(CloneMetadata.device_size_min(self.nr_regions)),
        )
        self.destination, self.metadata, self.source = (
            CrashDevice(
                len(content),
                seed + nr,
                content=content,
                inline_chance=inline,
                name=name,
                border=_border(seed),
            )
            for nr, (name, content) in enumerate(
                [
                    ("/destination", destination),
                    ("/metadata", metadata),
                    ("/source", self.content),
                ]
            )
        )
        self.devices = {
            "/destination": self.destination,
            "/metadata": self.metadata,
            "/source": self.source,
        }
        self.at_risk = (self.destination, self.metadata)
        self.invariants: CloneInvariants = CloneInvariants(
            self._maybe_target,
            self.source,
            self.destination,
            self.metadata,
            content=self.content,
            region_size=REGION_SIZE,
            before=before,
        )

    @property
    def nr_regions(self) -> int:
        return -(-len(self.content) // REGION_SIZE)

    @property
    def nr_compactions(self) -> int:
        """In all lives of this metadata."""
        target = self._maybe_target()
        return 0 if target is None else target._metadata._superblock.nr_compactions

    def _maybe_target(self) -> CloneTarget | None:
        if self.registry is None:
            return None
        table = self.registry.get("d").active
        return None if table is None else _maybe_clone_of(table)

    async def load(self) -> None:
        await super().load()
        table = self._registry.get("d").inactive
        assert table is not None
        target = _maybe_clone_of(table)
        assert target is not None
        self.invariants.watch_jobs(target)

    async def message(self, *words: str) -> None:
        if self._maybe_target() is not None:  # else `linear` has taken its place
            await super().message(*words)

    async def set_background(self, *, on: bool) -> None:
        await self.message("enable_hydration" if on else "disable_hydration")

    def reboot(self, seed: int, images: tuple[bytes, ...]) -> "CloneRig":
        assert self.source.image() == self.content, "the source was written"
        return type(self)(
            seed, self.destination.inline_chance, images, before=self.invariants
        )

    async def check(self) -> None:
        assert self.source.image() == self.content, "the source was written"
        # A format that was cut short is fine: `check_survivors` knows that nothing was lost.
        with contextlib.suppress(NotFormatted):
            await run(self.metadata, check(self.metadata.size))

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        assert isinstance(promised, bitarray)
        self.invariants.i1_committed_regions_are_on_the_destination(model, promised)

    @property
    def is_settled(self) -> bool:
        """Whether everything is hydrated and committed."""
        target = self._maybe_target()
        return target is None or target._metadata.hydration_done


class QuietCloneRig(CloneRig):
    """Hydrates nothing unless it is told to."""

    features = "1 no_hydration"


class WornCloneRig(CloneRig):
    """More regions, and a journal that is about to be compacted."""

    content = source_content(20 * REGION_SIZE + SECTOR)
    worn = worn_metadata(REGION_SIZE, len(content), 9)

    def __init__(
        self,
        seed: int,
        inline: float,
        images: tuple[bytes, ...] | None = None,
        *,
        before: CloneInvariants | None = None,
    ) -> None:
        # The hydrated regions are on the destination.
        super().__init__(
            seed, inline, images or (self.content, self.worn), before=before
        )

    async def stop(self) -> None:
        self.invariants.counts["compactions"] += self.nr_compactions
        await super().stop()


def _maybe_clone_of(table: Table) -> CloneTarget | None:
    (target,) = table.targets
    return target if isinstance(target, CloneTarget) else None


def _border(seed: int) -> int:
    """Every fourth disk writes 4 KiB at a time."""
    return BORDERS[seed % 4 == 3]
