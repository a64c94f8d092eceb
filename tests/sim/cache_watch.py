# SPDX-License-Identifier: Apache-2.0
"""The invariants J1 to J8, held against the cache of a simulated machine.

They are those of `tests/support/crash/cache_invariants.py`. What is discarded the model of the clients knows, over all
lives. J1, J5 and J6 of the images are the clients' own: what they read after a cut is held
against the model.
"""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from nbdtarget.bio import Bio
from nbdtarget.dm.registry import Registry
from nbdtarget.dm.table import Table
from nbdtarget.policies.smq.policy import Smq
from nbdtarget.targets.cache.target import CacheTarget
from tests.support.crash.cache_invariants import CacheInvariants
from tests.support.devices import CrashDevice

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = ["CacheWatch"]

QUIET_S: Final = 5.0


class CacheWatch(CacheInvariants):
    """Watches the cache that is mapped device `d`, for one life.

    Attributes:
        is_uncached: whether there is a table; asked when it is no cache's.
    """

    is_uncached: Callable[[], bool]

    @classmethod
    def maybe_of(cls, life: "Life") -> "CacheWatch | None":
        """Return a watch for a life whose rig has a cache; otherwise None."""
        disks = life.disks
        if "/cache" not in disks:
            return None

        def device_table() -> Table | None:
            device = life.registry.maybe_device("d")
            return None if device is None else device.active

        def event_nr() -> int:
            device = life.registry.maybe_device("d")
            return 0 if device is None else device.event_nr

        watch = cls(
            lambda: _maybe_cache(device_table()),
            event_nr,
            disks["/metadata"],
            disks["/cache"],
            disks.get("/origin"),
            block_size=life.rig.region_size,
            is_discarded=life.model.may_be_discarded,
        )
        watch.is_uncached = lambda: device_table() is not None
        return watch

    def j5_no_data_is_written_while_recorded_clean(
        self, target: CacheTarget | None, device: CrashDevice, bio: Bio
    ) -> None:
        """Check J5. When the origin is used alone, check instead that no block is recorded as cached."""
        if target is not None or not self.is_uncached():
            super().j5_no_data_is_written_while_recorded_clean(target, device, bio)
            return
        self.counts["uncached writes"] += 1
        on_disk = self.maybe_on_disk()
        if on_disk is not None and on_disk.nr_mapped:
            raise self._broken(f"J5: {bio} passes by {on_disk.nr_mapped} cached blocks")

    async def be_quiet(self) -> None:
        """Check that a cache does no I/O while no client asks for anything and no work is left (J8)."""
        await asyncio.sleep(QUIET_S)  # the server may still read what a client sent
        target = self.find_target()
        if target is None or not self._is_at_rest(target):
            return
        before = self._nr_operations
        await asyncio.sleep(QUIET_S)
        if target is self.find_target() and self._is_at_rest(target):
            self.j8_idle_and_clean_is_quiet(self._nr_operations - before)

    def _is_at_rest(self, target: CacheTarget) -> bool:
        """Whether all is clean, committed and where the policy wants it."""
        return not (
            target._is_suspended
            or target._metadata.nr_dirty
            or target._metadata.nr_cleaned
            or any(device._deferred for device in self._devices)
            or not target._committer.is_clean
            or target._committer._is_compacting
            or target._migrations.requests._ranges
            or target._blocks.nr_migrating
            or _has_work(target)
        )

    @property
    def _nr_operations(self) -> int:
        return sum(len(device.trace) for device in self._devices)

    def watch_tables(self, registry: Registry) -> None:
        """A table was loaded."""
        device = registry.get("d")
        target = _maybe_cache(device.inactive or device.active)
        if target is not None:
            self.watch(target)


def _has_work(target: CacheTarget) -> bool:
    """Whether migrations are queued."""
    policy = target._blocks.policy
    assert isinstance(policy, Smq)
    return len(policy.tracker) > 0


def _maybe_cache(table: Table | None) -> CacheTarget | None:
    if table is None:
        return None
    target = table.targets[0]
    return target if isinstance(target, CacheTarget) else None  # uncached
