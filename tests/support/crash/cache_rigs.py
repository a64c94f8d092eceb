# SPDX-License-Identifier: Apache-2.0
"""Caches that the crash machine drives: metadata, cache device and origin lose power together.

Blocks are as large as the clone's regions, so that the machine's ranges fit both; `small_blocks`
lifts the lower bound for that. The cache is half as large as the origin, whose tail is no whole
block: promotions, demotions and the reuse of cache blocks come often.

Passthrough is refused after an unclean stop, or when something is dirty. Then the rig does what
a user would: it loads a writeback table, and goes on.
"""

import asyncio
import contextlib
import errno as errnos
import random
from collections.abc import Iterator
from typing import Final
from unittest import mock

from nbdtarget.common.errors import TableError
from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK, WRITETHROUGH
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget.targets.metadata_io import run
from nbdtarget.targets.powercut.volatile_cache import BORDERS
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import NotFormatted
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import examine, mend
from tests.support.crash.cache_invariants import CacheInvariants, maybe_open_cache
from tests.support.crash.images import run_over
from tests.support.crash.rigs import CONTENT, DISK_SIZE, REGION_SIZE, _RegistryRig
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR, DiskModel

__all__ = [
    "BLOCK_SIZE",
    "NR_CBLOCKS",
    "CacheRig",
    "LoggedCacheRig",
    "PassthroughRig",
    "SwitchingCacheRig",
    "WritethroughRig",
    "cache_table",
    "checked",
    "small_blocks",
]

BLOCK_SIZE: Final = REGION_SIZE
NR_CBLOCKS: Final = 4
MESSAGE_TURNS_MAX: Final = 10_000

REFUSALS: Final = (
    "unable to resume into passthrough mode after unclean shutdown",
    "cannot enter passthrough mode unless all blocks are clean",
)


@contextlib.contextmanager
def small_blocks() -> Iterator[None]:
    """Admit blocks of any number of sectors; what is done so many at a time, few at a time."""
    with contextlib.ExitStack() as patches:
        for module, name, value in (
            ("nbdtarget.targets.cache.table", "BLOCK_SECTORS_MIN", 1),
            ("nbdtarget_metadata.cache.metadata", "BLOCK_SIZE_MIN", SECTOR),
            ("nbdtarget_metadata.cache.superblock", "BLOCK_SIZE_MIN", SECTOR),
            ("nbdtarget_metadata.cache.blocks", "TAKEN_BACK_MAX", 1),
            ("nbdtarget.targets.cache.foreground", "PIECES_AT_ONCE", 3),
            ("nbdtarget.targets.cache.pieces", "PIECES_AT_ONCE", 1),
            ("nbdtarget.targets.cache.pieces", "PIECES_MAX", 2),
            ("nbdtarget.targets.cache.sweep", "STEP_CBLOCKS", 2),
            ("nbdtarget.targets.cache.promotion_requests", "STEP_OBLOCKS", 2),
            ("nbdtarget.targets.cache.migrations", "LOCKED_MAX", 2),
        ):
            patches.enter_context(mock.patch(f"{module}.{name}", value))
        yield


def cache_table(
    mode: str,
    *features: str,
    policy: str = "smq 0",
    size: int = DISK_SIZE,
    block_size: int = BLOCK_SIZE,
) -> str:
    """The line of a cache over `size` bytes of /origin."""
    words = (mode, *features)
    return (
        f"0 {size // SECTOR} cache /metadata /cache /origin {block_size // SECTOR}"
        f" {len(words)} {' '.join(words)} {policy}"
    )


def checked(metadata: bytes) -> bytes:
    """Take back `needs_check`, as somebody does who has checked what is on the disk."""
    image = bytearray(metadata)
    with contextlib.suppress(NotFormatted):
        if run_over(image, examine(CACHE_CHECKS, len(image), unused=False)).needs_check:
            run_over(
                image,
                mend(
                    CACHE_CHECKS,
                    len(image),
                    heal=False,
                    clear_needs_check=True,
                ),
            )
    return bytes(image)


class CacheRig(_RegistryRig):
    """A writeback cache. Subclasses use other modes.

    Attributes:
        tables: any of which a `load` may load.
        nr_refusals: of passthrough.
    """

    tables: tuple[str, ...] = (cache_table(WRITEBACK),)
    discards_last = True
    messages: tuple[tuple[str, ...], ...] = (
        ("warm", "0-7"),
        ("warm", "2-5"),
        ("warm", "6"),
        ("clean_now",),
        ("pin", "3"),
        ("unpin", "0-7"),
        ("migration_threshold", "0"),
        ("migration_threshold", "2048"),
        ("migration_rate", "100000"),
        ("migration_rate", "0"),
        ("invalidate_cblocks", "0-3"),
        ("invalidate_cblocks", "2"),
    )

    def __init__(
        self,
        seed: int,
        inline: float,
        images: tuple[bytes, ...] | None = None,
        *,
        before: CacheInvariants | None = None,
    ) -> None:
        """`images`: of metadata, cache and origin; else nothing, garbage, the content."""
        super().__init__()
        self._random = random.Random(seed)
        self.table = self._random.choice(self.tables)
        metadata, cache, origin = images or (
            # The smallest that works: compactions come early.
            bytes(CacheMetadata.device_size_min(NR_CBLOCKS)),
            random.Random(seed).randbytes(NR_CBLOCKS * BLOCK_SIZE),
            self.content,
        )
        border = BORDERS[seed % 4 == 3]
        self.metadata, self.cache, self.origin = (
            CrashDevice(
                len(content),
                seed + nr,
                content=content,
                inline_chance=inline,
                name=name,
                border=border,
            )
            for nr, (name, content) in enumerate(
                [("/metadata", metadata), ("/cache", cache), ("/origin", origin)]
            )
        )
        self.at_risk = (self.metadata, self.cache, self.origin)
        self.devices = {device.name: device for device in self.at_risk}
        self.invariants: CacheInvariants = CacheInvariants(
            self.maybe_target,
            self._event_nr,
            self.metadata,
            self.cache,
            self.origin,
            block_size=BLOCK_SIZE,
            before=before,
        )

    def maybe_target(self) -> CacheTarget | None:
        if self.registry is None:
            return None
        table = self.registry.get("d").active
        return None if table is None else _cache_of(table.targets[0])

    def _event_nr(self) -> int:
        return 0 if self.registry is None else self.registry.get("d").event_nr

    @property
    def nr_operations(self) -> int:
        return sum(len(device.trace) for device in self.at_risk)

    async def load(self) -> None:
        self.table = self._random.choice(self.tables)
        await self._load()

    async def _load(self) -> None:
        await super().load()
        table = self._registry.get("d").inactive
        assert table is not None
        self.invariants.watch(_cache_of(table.targets[0]))

    async def resume(self) -> None:
        target = self.maybe_target()
        try:
            await super().resume()
        except TableError as error:
            self._check_refusal(error, target)
            self.invariants.counts["refusals"] += 1
            self.table = self.table.replace(PASSTHROUGH, WRITEBACK)
            await self._load()
            await super().resume()

    def _check_refusal(self, error: TableError, before: CacheTarget | None) -> None:
        """Check that only passthrough is refused, that there is a reason, and that nothing has changed."""
        assert self.maybe_target() is before
        table = self._registry.get("d").inactive
        assert table is not None
        refused = _cache_of(table.targets[0])
        reason = error.reason.removeprefix("cache: ")
        assert reason in REFUSALS, error
        assert refused._blocks.is_passthrough
        is_dirty = reason == REFUSALS[1]
        assert error.errno == (errnos.EBUSY if is_dirty else errnos.EINVAL)
        assert refused._metadata.nr_dirty or not is_dirty

    async def message(self, *words: str) -> None:
        target = self.maybe_target()
        assert target is not None
        if target._blocks.is_passthrough:
            if words[0] in ("warm", "pin"):
                words = ("invalidate_cblocks", "1-4")
            if target._is_suspended and words[0] == "invalidate_cblocks":
                return
        elif words[0] == "invalidate_cblocks":
            words = ("clean_now",)
        # `invalidate_cblocks` comes back later to what is locked.
        sending = asyncio.ensure_future(super().message(*words))
        for _ in range(MESSAGE_TURNS_MAX):
            if sending.done():
                break
            await asyncio.sleep(0)
            self.clock.advance(0.001)
        await sending

    async def set_background(self, *, on: bool) -> None:
        if on:
            await self.message("clean_now")

    @property
    def is_settled(self) -> bool:
        """Whether no block is dirty, and none is being migrated."""
        target = self.maybe_target()
        assert target is not None
        return not (target._metadata.nr_dirty or target._blocks.nr_migrating)

    def reboot(self, seed: int, images: tuple[bytes, ...]) -> "CacheRig":
        metadata, *others = images
        return type(self)(
            seed,
            self.cache.inline_chance,
            (checked(metadata), *others),
            before=self.invariants,
        )

    async def check(self) -> None:
        # A format that was cut short is fine: `check_survivors` knows that nothing was lost.
        with contextlib.suppress(NotFormatted):
            found = await run(self.metadata, examine(CACHE_CHECKS, self.metadata.size))
            assert not found.damage

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        self.invariants.j1_images_have_all_data(model)


class LoggedCacheRig(CacheRig):
    """With a dirty log, that reloads switch on and off; by seed, writeback in origin order."""

    tables = (
        cache_table(WRITEBACK, "dirty_log"),
        cache_table(WRITEBACK, "dirty_log", "sorted_writeback"),
        cache_table(WRITEBACK, "sorted_writeback"),
        cache_table(WRITETHROUGH, "dirty_log"),
    )


class WritethroughRig(CacheRig):
    """Nothing is dirty, and an unclean stop leaves the origin alone: sometimes it is used so."""

    tables = (cache_table(WRITETHROUGH, "metadata2"),)

    def check_survivors(self, model: DiskModel, promised: object) -> None:
        super().check_survivors(model, promised)
        found = maybe_open_cache(self.metadata.image(), BLOCK_SIZE)
        rng = self._random
        if found is None or not found.gives_up_mappings or rng.random() < 0.5:
            return
        content = bytearray(self.origin.image())
        for _ in range(4):
            at = rng.randrange(len(content) // SECTOR) * SECTOR
            content[at : at + SECTOR] = rng.randbytes(SECTOR)
        self.origin._stable[:] = content
        model.settle(bytes(content))
        self.invariants.counts["used alone"] += 1


class PassthroughRig(CacheRig):
    """A cache whose reloads enter passthrough from other modes. Passthrough invalidates their blocks one by one."""

    tables = (
        cache_table(PASSTHROUGH),
        cache_table(WRITETHROUGH),
        cache_table(WRITEBACK),
        cache_table(PASSTHROUGH, "dirty_log"),
    )


class SwitchingCacheRig(CacheRig):
    """Any mode, any policy, with and without a dirty log: another one at each reload."""

    tables = (
        cache_table(WRITEBACK),
        cache_table(WRITEBACK, policy="mq 0"),
        cache_table(WRITEBACK, policy="cleaner 0"),
        cache_table(WRITEBACK, "dirty_log", policy="cleaner 0"),
        cache_table(WRITEBACK, "no_discard_passdown", policy="default 0"),
        cache_table(WRITETHROUGH),
        cache_table(WRITETHROUGH, "dirty_log", "no_discard_passdown"),
        cache_table(PASSTHROUGH),
        cache_table(PASSTHROUGH, "dirty_log"),
    )


def _cache_of(target: object) -> CacheTarget:
    assert isinstance(target, CacheTarget)
    return target


assert len(CONTENT) == DISK_SIZE
