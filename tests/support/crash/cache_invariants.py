# SPDX-License-Identifier: Apache-2.0
"""The invariants J1 to J8, which must hold of a cache besides the oracle.

Theory of operation. `CacheInvariants` watches the crash devices of one life, and the cache that
serves bios there. It trusts no state of the target: it reads the durable metadata from the metadata
device, by opening it, whenever that has been written.

    J1  what was written back is on the origin before the mapping's removal is       images,
        committed; that is committed before the cblock gets another block's data,    bios
        and before a write to the oblock goes to the origin
    J2  no two cblocks map one oblock; policy and metadata say the same              each look
    J3  passthrough: nothing is dirty, nothing is promoted, nothing is written       each look,
        to the cache device                                                          bios
    J4  a clean block without a lock is the same on both devices                     each look
    J5  while CLEAN_SHUTDOWN is on disk no data is written; after a cut every        bios,
        block that is recorded clean has on the origin what the oracle allows        images
    J6  after an unclean stop each mapped block is dirty (with a dirty log: each     images
        that is not is the same on both, as far as the oracle can tell); or, where
        it is recorded that the origin has everything, none is: then the origin
        alone has what the oracle allows, and no mapping counts
    J7  nr_dirty is the number of dirty bits, the policy's dirty blocks are the      each look
        same; when it becomes 0 there is an event
    J8  a cache that is idle and clean does no I/O at all                            `quiet`

J4 leaves out discarded sectors, on which the devices may differ. J4 and J7's event
are about a cache whose devices work: a disk that has failed ends them for its life.

`counts` says how often each was held against something, and how often each of the events
happened that a cache is there for: a rig without such events proves nothing.
"""

from collections.abc import Callable
from typing import Any, Final

from nbdtarget.bio import OP_DISCARD, OP_WRITE, OP_WRITE_ZEROES, Bio
from nbdtarget.policies.smq.policy import _DIRTY, Smq
from nbdtarget.targets.cache.discards import DiscardBits
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import CorruptMetadata, NotFormatted
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import mend
from tests.support.crash.images import run_over
from tests.support.crash.invariants import Broken, Invariants
from tests.support.devices import CrashDevice
from tests.support.model import SECTOR, DiskModel

__all__ = ["EVENTS", "CacheInvariants", "maybe_open_cache"]

WRITES: Final = (OP_WRITE, OP_WRITE_ZEROES, OP_DISCARD)

# The events that are counted: the attribute of the target, and its method that carries one out.
EVENTS: Final = {
    "promotions": ("_migrations", "_promote"),
    "demotions": ("_migrations", "_demote"),
    "writebacks": ("_migrations", "_write_back"),
    "sweeps": ("_migrations", "_sweep_block"),
    "overwrites": ("_foreground", "_overwritten"),
    "writes through": ("_writes", "_write_through"),
    "logged writes": ("_writes", "_advance_after_log"),
    "invalidations": ("_writes", "_invalidate"),
    "writes after a commit": ("_writes", "_advance_after_commit"),
    "discards": ("_foreground", "_discard"),
}


def maybe_open_cache(image: bytes, block_size: int) -> CacheMetadata | None:
    """Return what the metadata on `image` say, once `needs_check` is cleared; None: nothing."""
    device = bytearray(image)
    size = len(image)
    opening = CacheMetadata.open(device_size=size, block_size=block_size)
    try:
        return run_over(device, opening)
    except NotFormatted:
        return None
    except CorruptMetadata as error:
        if error.found != "needs_check":
            raise
    run_over(
        device,
        mend(CACHE_CHECKS, size, heal=False, clear_needs_check=True),
    )
    opening = CacheMetadata.open(device_size=size, block_size=block_size)
    return run_over(device, opening)


class CacheInvariants(Invariants):
    """Watches one life of a cache. Put on its devices by the rig.

    Args:
        find_target: returns what serves bios now, if anything does.
        find_event_nr: how many events the mapped device has had.
        origin: None if it is no crash device: then J4 and the images are left out.
        before: of the life before the power cut; its `counts` go on.
        is_discarded: whether a sector may have been, and may differ; else we watch that, too.

    Attributes:
        may_differ: a device has failed: J4 and J7's event are not asked for any more.
    """

    def __init__(
        self,
        find_target: Callable[[], CacheTarget | None],
        find_event_nr: Callable[[], int],
        metadata: CrashDevice,
        cache: CrashDevice,
        origin: CrashDevice | None,
        *,
        block_size: int,
        before: "CacheInvariants | None" = None,
        is_discarded: Callable[[int], bool] | None = None,
    ) -> None:
        super().__init__()
        self.find_target = find_target
        self.find_event_nr = find_event_nr
        self.metadata = metadata
        self.cache = cache
        self.origin = origin
        self.block_size = block_size
        self.may_differ = False
        self._is_discarded = is_discarded
        self._discarded: set[int] = set()  # sectors that may differ
        if before is not None:
            self.counts = before.counts
            self._discarded = before._discarded.copy()
        self.broken: Broken | None = None
        self._on_disk: CacheMetadata | None = None
        self._is_stale = True  # the metadata device was written since that was opened
        self._target: CacheTarget | None = None
        self._was_dirty = False
        self._event_nr = 0
        self._devices = [
            device for device in (metadata, cache, origin) if device is not None
        ]
        for device in self._devices:
            device.watchers.append(self)

    def watch(self, target: CacheTarget) -> None:
        """See this target's work. Call before it is resumed."""
        for what, (part, name) in EVENTS.items():
            self._count_calls(getattr(target, part), name, what)
        discards = target._discards
        set_range = discards.set_range

        def watched_set_range(offset: int, length: int) -> None:
            self._discarded.update(
                range(offset // SECTOR, -(-(offset + length) // SECTOR))
            )
            set_range(offset, length)

        discards.set_range = watched_set_range  # type: ignore[method-assign]

    def _count_calls(self, part: Any, name: str, what: str) -> None:
        method = getattr(part, name)

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.counts[what] += 1
            return method(*args, **kwargs)

        setattr(part, name, counted)

    # ---- what the devices see ----

    def started(self, device: CrashDevice, bio: Bio) -> None:
        if bio.op not in WRITES or device is self.metadata:
            return
        target = self.find_target()
        self.j5_no_data_is_written_while_recorded_clean(target, device, bio)
        if target is None or target._metadata.mode is Mode.FAIL:
            return
        if device is self.cache:
            self.j3_passthrough_leaves_the_cache_alone(target, bio)
            self.j1_cblock_is_free_on_disk(target, bio)
        else:
            if target._metadata.mode is Mode.RW:
                self.j1_oblock_is_not_mapped_on_disk_only(target, bio)
            if bio.op != OP_DISCARD:
                self._discarded.difference_update(_whole_sectors(bio))

    def finished(self, device: CrashDevice, bio: Bio, errno: int) -> None:
        self.may_differ |= bool(errno)
        if device is self.metadata and bio.op in WRITES:
            self._is_stale = True
        self.look()

    def maybe_on_disk(self) -> CacheMetadata | None:
        """Return the durable metadata, which a power cut now would leave."""
        if self._is_stale:
            self._is_stale = False
            image = self.metadata.stable_image()
            self._on_disk = maybe_open_cache(image, self.block_size)
        return self._on_disk

    # ---- what the machine says ----

    def look(self) -> None:
        """Check all invariants, and raise an error found inside a bio's `submit`, where it may have been caught."""
        target = self.find_target()
        if target is not None and target._is_active:
            mode = target._metadata.mode
            if mode is not Mode.FAIL:
                self.j2_one_place_for_each_block(target)
                self.j3_passthrough_is_clean(target)
                self.j7_dirty_blocks_are_counted(target)
            if mode is Mode.RW and self.origin is not None:
                self.j4_clean_blocks_are_the_same(target, self.origin)
        if self.broken is not None:
            raise self.broken

    # ---- the invariants ----

    def j1_cblock_is_free_on_disk(self, target: CacheTarget, bio: Bio) -> None:
        """Check that the metadata on disk map a cblock that is written to no other oblock."""
        on_disk = self.maybe_on_disk()
        assert on_disk is not None, "a cache without metadata"
        for cblock in self._blocks_of(bio):
            there = on_disk.maybe_oblock(cblock)
            self.counts["J1"] += 1
            if there is None or there == target._metadata.maybe_oblock(cblock):
                continue
            raise self._broken(f"J1: {bio} to cblock {cblock}, still {there}'s on disk")

    def j1_oblock_is_not_mapped_on_disk_only(
        self, target: CacheTarget, bio: Bio
    ) -> None:
        """Check that no mapping on disk would hide a write to the origin after a crash."""
        on_disk = self.maybe_on_disk()
        assert on_disk is not None, "a cache without metadata"
        for oblock in self._blocks_of(bio):
            self.counts["J1"] += 1
            if (
                on_disk.maybe_cblock(oblock) is not None
                and target._metadata.maybe_cblock(oblock) is None
            ):
                raise self._broken(
                    f"J1: {bio} to oblock {oblock}, still mapped on disk"
                )

    def j1_images_have_all_data(self, model: DiskModel) -> None:
        """Hold what the devices contain, after a power cut, against the oracle."""
        found = maybe_open_cache(self.metadata.image(), self.block_size)
        assert self.origin is not None
        cache, origin = self.cache.image(), self.origin.image()
        size = self.block_size
        if found is not None and found.gives_up_mappings:
            self.j6_nothing_is_dirty(found)
            found = None  # no mapping counts
        if found is not None and not (found.is_recorded_clean or found.dirty_log):
            self.j6_all_mapped_blocks_are_dirty(found)
        for begin in range(0, model.size, size):
            end = min(begin + size, model.size)
            oblock, cblock = begin // size, None
            if found is not None and end - begin == size:
                cblock = found.maybe_cblock(oblock)
            data = origin[begin:end]
            if cblock is not None:
                data = cache[cblock * size : (cblock + 1) * size]
            self._hold_survivor("J1", model, begin, data)
            if found is not None and cblock is not None and not found.dirty[cblock]:
                name = "J5" if found.is_recorded_clean else "J6"
                self._hold_survivor(name, model, begin, origin[begin:end])

    def _hold_survivor(
        self, name: str, model: DiskModel, begin: int, data: bytes
    ) -> None:
        self.counts[name] += 1
        try:
            model.check_survivor(data, begin)
        except AssertionError as error:
            raise self._broken(
                f"{name}: oblock {begin // self.block_size}: {error}"
            ) from error

    def j2_one_place_for_each_block(self, target: CacheTarget) -> None:
        metadata, policy = target._metadata, target._blocks.policy
        assert isinstance(policy, Smq)
        seen: dict[int, int] = {}
        for cblock in range(metadata.nr_cblocks):
            oblock = metadata.maybe_oblock(cblock)
            if oblock is None:
                continue
            self.counts["J2"] += 1
            found = metadata.maybe_cblock(oblock), policy._table.find(oblock)
            if oblock in seen or found != (cblock, cblock):
                raise self._broken(
                    f"J2: oblock {oblock} is in cblock {cblock}; index and policy say {found}"
                )
            seen[oblock] = cblock

    def j3_passthrough_is_clean(self, target: CacheTarget) -> None:
        if target._blocks.is_passthrough:
            self.counts["J3"] += 1
            if target._metadata.nr_dirty or target._blocks.nr_promotions:
                raise self._broken("J3: passthrough, and dirty blocks or promotions")

    def j3_passthrough_leaves_the_cache_alone(
        self, target: CacheTarget, bio: Bio
    ) -> None:
        if target._blocks.is_passthrough:
            raise self._broken(f"J3: passthrough, and the cache device gets {bio}")

    def j4_clean_blocks_are_the_same(
        self, target: CacheTarget, origin: CrashDevice
    ) -> None:
        metadata, locks = target._metadata, target._blocks.locks
        if self.may_differ:
            return
        size = self.block_size
        for cblock in range(metadata.nr_cblocks):
            oblock = metadata.maybe_oblock(cblock)
            if (
                oblock is None
                or metadata.dirty[cblock]
                or locks.maybe_blocking(oblock, is_write=True) is not None
                or locks.nr_writers(oblock)
            ):
                continue
            self.counts["J4"] += 1
            here, there = cblock * size, oblock * size
            ours = self.cache._read(here, size)
            theirs = origin._read(there, size)
            if ours == theirs:
                continue
            for at in range(0, size, SECTOR):
                if ours[at : at + SECTOR] != theirs[
                    at : at + SECTOR
                ] and not self._may_be_discarded((there + at) // SECTOR):
                    raise self._broken(
                        f"J4: cblock {cblock} is clean, oblock {oblock} differs"
                    )

    def j5_no_data_is_written_while_recorded_clean(
        self, target: CacheTarget | None, device: CrashDevice, bio: Bio
    ) -> None:
        """In mode RO what changes nothing of what is recorded may go on."""
        on_disk = self.maybe_on_disk()
        if on_disk is None:
            return
        self.counts["J5"] += 1
        if not on_disk.is_recorded_clean:
            return
        if target is not None and target._metadata.mode is Mode.RO:
            discards = DiscardBits(self.block_size, on_disk.origin_size)
            discards.load(on_disk.discarded)
            where = [nr for nr in self._blocks_of(bio) if nr < on_disk.nr_oblocks]
            if device is self.cache:
                held = map(on_disk.maybe_oblock, self._blocks_of(bio))
                where = [oblock for oblock in held if oblock is not None]
            if bio.op == OP_DISCARD or not any(map(discards.is_discarded, where)):
                return
        raise self._broken(f"J5: recorded clean, and there is {bio}")

    def j6_all_mapped_blocks_are_dirty(self, found: CacheMetadata) -> None:
        self.counts["J6"] += found.nr_mapped
        if found.nr_dirty != found.nr_mapped:
            raise self._broken(
                f"J6: unclean, {found.nr_mapped} blocks, {found.nr_dirty} dirty"
            )

    def j6_nothing_is_dirty(self, found: CacheMetadata) -> None:
        self.counts["J6"] += found.nr_mapped
        self.counts["given up"] += found.nr_mapped
        if found.nr_dirty:
            raise self._broken(f"J6: the origin has everything, but {found.nr_dirty}")

    def j7_dirty_blocks_are_counted(self, target: CacheTarget) -> None:
        metadata, policy = target._metadata, target._blocks.policy
        assert isinstance(policy, Smq)
        self.counts["J7"] += 1
        dirty = {
            cblock
            for cblock in range(metadata.nr_cblocks)
            if metadata.dirty[cblock] and metadata.maybe_oblock(cblock) is not None
        }
        thought = {
            cblock
            for cblock in range(policy.nr_cblocks)
            if policy._flags[cblock] & _DIRTY
        }
        if not metadata.nr_dirty == metadata.dirty.count() == len(dirty):
            raise self._broken(
                f"J7: nr_dirty is {metadata.nr_dirty}, dirty are {dirty}"
            )
        if dirty != thought:
            raise self._broken(f"J7: dirty are {dirty}, the policy has {thought}")
        event_nr = self.find_event_nr()
        if target is self._target and self._was_dirty and not dirty:
            self.counts["J7 events"] += 1
            if event_nr == self._event_nr and not self.may_differ:
                raise self._broken("J7: nothing is dirty any more, and no event")
        self._target = target
        self._was_dirty = bool(dirty)
        self._event_nr = event_nr

    def j8_idle_and_clean_is_quiet(self, nr_operations: int) -> None:
        """Check J8. `nr_operations` is the number of operations on all devices in a time without any request."""
        self.counts["J8"] += 1
        if nr_operations:
            raise self._broken(f"J8: idle and clean, and {nr_operations} operations")

    def _may_be_discarded(self, sector: int) -> bool:
        if self._is_discarded is not None:
            return self._is_discarded(sector)
        return sector in self._discarded

    def _blocks_of(self, bio: Bio) -> range:
        size = self.block_size
        return range(bio.offset // size, -(-(bio.offset + bio.length) // size))

    def _broken(self, what: str) -> Broken:
        """Make the error, and keep it: the target may catch the exception of the task that raises it."""
        self.broken = self.broken or Broken(what)
        return self.broken


def _whole_sectors(bio: Bio) -> range:
    return range(-(-bio.offset // SECTOR), (bio.offset + bio.length) // SECTOR)
