# SPDX-License-Identifier: Apache-2.0
"""The answers of the offline metadata tools: `str()` is for people, the fields are for programs (JSON)."""

from typing import Any

import msgspec

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.superblock import DIRTY_LOG, CacheSuperblock
from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.disks import FILE, NOT_MARKED, Disk, decode_disks
from nbdtarget_metadata.log.envelope import FORMAT_VERSION
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, Found, Superblock
from nbdtarget_metadata.tools.check import CopyState, Findings
from nbdtarget_metadata.tools.dump import flag_names
from nbdtarget_metadata.tools.kernel_import import Imported

__all__ = [
    "CheckAnswer",
    "ImportAnswer",
    "InfoAnswer",
    "RestoreAnswer",
    "check_answer",
    "import_answer",
    "info_answer",
    "loss_of",
    "restore_answer",
]


class DiskAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The record of a disk that belongs to the metadata; `nbdtarget_metadata.disks` explains it.

    `changed_ns`: the time of the last change of a file that is not in use, in ns of Unix time. `marked`:
    the generation of the mark on it.
    """

    role: str
    kind: str
    name: str
    size: int
    ids: list[str]
    device: int | None
    inode: int | None
    marked: int | None
    changed_ns: int | None
    samples: int

    def __str__(self) -> str:
        evidence = [self.kind, _size_text(self.size), *self.ids]
        if self.inode is not None:
            evidence.append(f"inode {self.inode}")
        if self.marked is not None:
            evidence.append(f"marked at generation {self.marked}")
        if self.samples:
            evidence.append(f"{self.samples} blocks sampled")
        return f"{self.name} ({', '.join(evidence)})"


def _disk_answer(disk: Disk) -> DiskAnswer:
    is_file = disk.kind == FILE
    return DiskAnswer(
        role=disk.role,
        kind=disk.kind or "disk",
        name=disk.name,
        size=disk.size,
        ids=list(disk.ids),
        device=disk.place[0] if is_file else None,
        inode=disk.place[1] if is_file else None,
        marked=disk.mark_generation if disk.mark_generation != NOT_MARKED else None,
        changed_ns=disk.mtime_ns if disk.is_stopped and disk.mtime_ns else None,
        samples=len(disk.sample.offsets) if disk.sample is not None else 0,
    )


class InfoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The content of the newest superblock. Sizes are bytes, arenas and their parts 4 KiB blocks.

    `degraded`: superblock copies that are not as they should be, for people.
    """

    file: str
    kind: str
    format_version: int
    uuid: str
    generation: int
    flags: list[str]
    nr_commits: int
    nr_compactions: int
    device_size: int
    arena: int
    arena_blocks: int
    snapshot_blocks: int
    journal_blocks: int
    journal_blocks_max: int
    degraded: list[str]
    disks: list[DiskAnswer]

    def rows(self) -> list[tuple[str, str]]:
        """Return the fields that only this kind of metadata has."""
        raise NotImplementedError

    def __str__(self) -> str:
        rows = [
            ("Kind", f"{self.kind}, format version {self.format_version}"),
            ("UUID", self.uuid),
            ("Generation", str(self.generation)),
            ("Flags", " ".join(self.flags) or "none"),
            *self.rows(),
            ("Commits", f"{self.nr_commits}, of which {self.nr_compactions} compacted"),
            ("Metadata size", _size_text(self.device_size)),
            ("Arena", f"{self.arena}, of {self.arena_blocks} blocks"),
            ("Snapshot", f"{self.snapshot_blocks} blocks"),
            ("Journal", f"{self.journal_blocks} of {self.journal_blocks_max} blocks"),
            *((each.role.capitalize(), str(each)) for each in self.disks),
            *(("Degraded", each) for each in self.degraded),
        ]
        return "\n".join(f"{name + ':':<16}{value}" for name, value in rows)


class CloneInfoAnswer(InfoAnswer, frozen=True, kw_only=True):
    """Facts about a clone's metadata."""

    region_size: int
    target_size: int
    nr_regions: int
    nr_hydrated: int

    def rows(self) -> list[tuple[str, str]]:
        percent = 100 * self.nr_hydrated / self.nr_regions
        return [
            ("Region size", _size_text(self.region_size)),
            ("Target size", _size_text(self.target_size)),
            ("Hydrated", f"{self.nr_hydrated}/{self.nr_regions} ({percent:.1f} %)"),
        ]


class CacheInfoAnswer(InfoAnswer, frozen=True, kw_only=True):
    """Facts about a cache's metadata. `nr_dirty`: None without a clean shutdown, because only the mappings tell it then.

    `gives_up_mappings`: it ended in a crash, and the origin has everything: none is dirty.
    """

    block_size: int
    origin_size: int
    nr_cblocks: int
    nr_cblocks_max: int
    nr_mapped: int
    nr_dirty: int | None
    gives_up_mappings: bool = False
    nr_logged: int
    dirty_log: bool
    policy: str
    policy_version: tuple[int, int, int]
    nr_discard_blocks: int
    read_hits: int
    read_misses: int
    write_hits: int
    write_misses: int

    def rows(self) -> list[tuple[str, str]]:
        percent = 100 * self.nr_mapped / self.nr_cblocks
        if self.gives_up_mappings:
            dirty = "none: the origin has everything, the next start gives the rest up"
        elif self.nr_dirty is not None:
            dirty = str(self.nr_dirty)
        else:
            dirty = f"{self.nr_logged if self.dirty_log else self.nr_mapped} at most"
        return [
            ("Block size", _size_text(self.block_size)),
            ("Origin size", _size_text(self.origin_size)),
            ("Mapped", f"{self.nr_mapped}/{self.nr_cblocks} ({percent:.1f} %)"),
            ("Dirty", dirty),
            ("Dirty log", f"{self.nr_logged} logged" if self.dirty_log else "none"),
            ("Hints", f"of {self.policy}" if self.policy else "none"),
            ("Reads", f"{self.read_hits} hits, {self.read_misses} misses"),
            ("Writes", f"{self.write_hits} hits, {self.write_misses} misses"),
        ]


def info_answer(
    path: str, kind: str, found: Found[Any], device_size: int
) -> InfoAnswer:
    """Return what a superblock says."""
    live: Superblock = found.superblock
    common: dict[str, Any] = {
        "file": path,
        "kind": kind,
        "format_version": FORMAT_VERSION,
        "uuid": live.uuid.hex(),
        "generation": live.generation,
        "flags": flag_names(live.flags),
        "nr_commits": live.nr_commits,
        "nr_compactions": live.nr_compactions,
        "device_size": device_size,
        "arena": live.arena,
        "arena_blocks": live.arena_blocks,
        "snapshot_blocks": live.snapshot_blocks,
        "journal_blocks": live.journal_blocks,
        "journal_blocks_max": live.arena_end - live.journal_block,
        "degraded": list(found.notes),
        "disks": [_disk_answer(disk) for disk in decode_disks(live.disks)],
    }
    if isinstance(live, CacheSuperblock):
        return CacheInfoAnswer(
            **common,
            block_size=live.block_size,
            origin_size=live.origin_size,
            nr_cblocks=live.nr_cblocks,
            nr_cblocks_max=live.nr_cblocks_max,
            nr_mapped=live.nr_mapped,
            nr_dirty=_maybe_nr_dirty(live),
            gives_up_mappings=live.gives_up_mappings,
            nr_logged=live.nr_logged,
            dirty_log=bool(live.incompat & DIRTY_LOG),
            policy=live.policy_name,
            policy_version=live.policy_version,
            nr_discard_blocks=live.nr_dblocks,
            read_hits=live.read_hits,
            read_misses=live.read_misses,
            write_hits=live.write_hits,
            write_misses=live.write_misses,
        )
    assert isinstance(live, CloneSuperblock)
    return CloneInfoAnswer(
        **common,
        region_size=live.region_size,
        target_size=live.target_size,
        nr_regions=live.nr_regions,
        nr_hydrated=live.nr_hydrated,
    )


class CheckAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The result of `check`; `nbdtarget_metadata.tools.check` defines the words.

    `complete`: everything was looked at. `done`: what was written.
    """

    file: str
    kind: str
    uuid: str | None
    generation: int | None
    needs_check: bool
    complete: bool
    damage: tuple[str, ...]
    copies: tuple[CopyState, ...]
    orphans: int
    orphan_blocks: int
    leaked_blocks: int
    done: tuple[str, ...]

    def counts(self) -> str:
        """Return the counters that only this kind of metadata has; empty if that cannot be read."""
        raise NotImplementedError

    def __str__(self) -> str:
        lines = [f"{self.file}: {self._headline()}"]
        for copy in self.copies:
            state = f"generation {copy.generation}, {copy.state}"
            if copy.fault:
                harmless = "" if self.damage else "a bad copy does no harm: "
                state = f"{harmless}{copy.fault}"
            lines.append(
                f"  superblock slot {copy.slot} copy {copy.copy} (block {copy.block}):"
                f" {state}"
            )
        counts = self.counts()
        if counts:
            lines.append(f"  {counts}")
        if self.orphans or self.leaked_blocks:
            lines.append(
                f"  harmless: {self.orphans} orphaned records in {self.orphan_blocks}"
                f" blocks, {self.leaked_blocks} leaked blocks"
            )
        if self.needs_check:
            lines.append("  needs_check is set" + self._how_to_clear())
        lines += [f"  {each}" for each in self.done]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.damage:
            return (
                f"{self.kind} metadata is damaged; `nbdtarget metadata repair -i {self.file}"
                " -o NEW_FILE` saves what is left"
            )
        return (
            f"{self.kind} metadata {self.uuid}, generation {self.generation}:"
            f" {'no damage' if self.complete else 'no damage so far, not a full pass'}"
        )

    def _how_to_clear(self) -> str:
        if self.damage:
            return ""
        if not self.complete:
            return "; only a full pass clears it"
        return "; --clear-needs-check clears it"


class CloneCheckAnswer(CheckAnswer, frozen=True, kw_only=True):
    """The result of a check of a clone's metadata."""

    nr_regions: int | None
    nr_hydrated: int | None

    def counts(self) -> str:
        if self.nr_regions is None:
            return ""
        return f"{self.nr_hydrated} of {self.nr_regions} regions hydrated"


class CacheCheckAnswer(CheckAnswer, frozen=True, kw_only=True):
    """The result of a check of a cache's metadata; `nr_dirty` as in `CacheInfoAnswer`."""

    clean_shutdown: bool | None
    nr_cblocks: int | None
    nr_mapped: int | None
    nr_dirty: int | None
    gives_up_mappings: bool = False

    def counts(self) -> str:
        if self.nr_cblocks is None:
            return ""
        if self.gives_up_mappings:
            end = (
                "not shut down cleanly; the origin has everything, and the next start"
                " gives the mappings up"
            )
        elif self.nr_dirty is None:
            end = "not shut down cleanly"
        else:
            end = f"{self.nr_dirty} dirty"
        return f"{self.nr_mapped} of {self.nr_cblocks} cache blocks mapped, {end}"


def _maybe_nr_dirty(superblock: CacheSuperblock) -> int | None:
    """How many blocks are dirty, if that is recorded."""
    if superblock.flags & CLEAN_SHUTDOWN:
        return superblock.nr_dirty
    return 0 if superblock.gives_up_mappings else None


def check_answer(
    path: str, kind: str, findings: Findings, done: tuple[str, ...]
) -> CheckAnswer:
    """Return what was found and done."""
    live = findings.superblock
    common: dict[str, Any] = {
        "file": path,
        "kind": kind,
        "uuid": live.uuid.hex() if live else None,
        "generation": live.generation if live else None,
        "needs_check": findings.needs_check,
        "complete": findings.complete,
        "damage": findings.damage,
        "copies": findings.copies,
        "orphans": findings.orphans,
        "orphan_blocks": findings.orphan_blocks,
        "leaked_blocks": findings.leaked_blocks,
        "done": done,
    }
    if kind == "cache":
        cache = live if isinstance(live, CacheSuperblock) else None
        clean = bool(cache.flags & CLEAN_SHUTDOWN) if cache else None
        return CacheCheckAnswer(
            **common,
            clean_shutdown=clean,
            nr_cblocks=cache.nr_cblocks if cache else None,
            nr_mapped=cache.nr_mapped if cache else None,
            nr_dirty=_maybe_nr_dirty(cache) if cache else None,
            gives_up_mappings=bool(cache and cache.gives_up_mappings),
        )
    clone = live if isinstance(live, CloneSuperblock) else None
    return CloneCheckAnswer(
        **common,
        nr_regions=clone.nr_regions if clone else None,
        nr_hydrated=clone.nr_hydrated if clone else None,
    )


class RestoreAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The metadata that was written. `nr_lost` as in a dump; `damage`: of the input of a repair."""

    file: str
    kind: str
    uuid: str
    generation: int
    nr_lost: int | None
    damage: tuple[str, ...]

    def counts(self) -> str:
        """Return the counters that only this kind of metadata has."""
        raise NotImplementedError

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.kind} metadata {self.uuid}, generation"
            f" {self.generation}: {self.counts()}{self._lost()}"
        )

    def _lost(self) -> str:
        if self.nr_lost is None:
            return ", an unknown number is lost"
        if self.nr_lost:
            return f", {self.nr_lost} are lost"
        return ", nothing is lost" if self.damage else ""


class CloneRestoreAnswer(RestoreAnswer, frozen=True, kw_only=True):
    """The result of a restore of a clone's metadata."""

    nr_regions: int
    nr_hydrated: int

    def counts(self) -> str:
        return f"{self.nr_hydrated} of {self.nr_regions} regions hydrated"


class CacheRestoreAnswer(RestoreAnswer, frozen=True, kw_only=True):
    """The result of a restore of a cache's metadata. `nr_doubtful` of the mapped blocks may hold other origin blocks by now."""

    nr_cblocks: int
    nr_mapped: int
    nr_dirty: int
    nr_doubtful: int

    def counts(self) -> str:
        doubtful = f", {self.nr_doubtful} doubtful" if self.nr_doubtful else ""
        return (
            f"{self.nr_mapped} of {self.nr_cblocks} cache blocks mapped,"
            f" {self.nr_dirty} dirty{doubtful}"
        )


def restore_answer(
    path: str, content: CloneContent | CacheContent, damage: tuple[str, ...]
) -> RestoreAnswer:
    """Return what was written."""
    common: dict[str, Any] = {
        "file": path,
        "uuid": content.uuid.hex(),
        "generation": content.generation,
        "nr_lost": content.nr_lost,
        "damage": damage,
    }
    if isinstance(content, CacheContent):
        return CacheRestoreAnswer(
            **common,
            kind="cache",
            nr_cblocks=content.nr_cblocks,
            nr_mapped=content.nr_mapped,
            nr_dirty=content.dirty.count(),
            nr_doubtful=content.nr_doubtful,
        )
    return CloneRestoreAnswer(
        **common,
        kind="clone",
        nr_regions=len(content.hydrated),
        nr_hydrated=content.hydrated.count(),
    )


def loss_of(content: CloneContent | CacheContent) -> str:
    """Say what is missing or doubtful; empty if nothing is."""
    generation = content.generation
    if content.nr_lost is None:
        return (
            f"generation {generation + 1} may have been acknowledged and is"
            f" lost: this is generation {generation}"
        )
    things = "cache blocks" if isinstance(content, CacheContent) else "hydrated regions"
    losses = []
    if content.nr_lost:
        losses.append(
            f"{content.nr_lost} {things} of generation {generation}"
            " are lost: nothing intact says which ones"
        )
    if isinstance(content, CacheContent) and content.nr_doubtful:
        losses.append(
            f"{content.nr_doubtful} cache blocks of generation {generation}"
            " may hold other origin blocks by now"
        )
    return ", and ".join(losses)


def _size_text(size: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >> shift and not size & ((1 << shift) - 1):
            return f"{size >> shift} {unit} ({size} bytes)"
    return f"{size} bytes"


class ImportAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The result of an import of the kernel's metadata.

    Args:
        source: the kernel's metadata.
        format_version: of the kernel's format.
        clean: the kernel had shut it down cleanly.
        needs_check: the kernel had marked it after a failed write.
        restored: what was written.
    """

    source: str
    format_version: int
    clean: bool
    needs_check: bool
    restored: RestoreAnswer

    def __str__(self) -> str:
        return f"{self.restored}\n{self.source}: {self._state()}"

    def _state(self) -> str:
        kind = f"dm-{self.restored.kind}, format {self.format_version}"
        if self.restored.kind == "clone":
            return f"{kind}: what it says of each region is believed"
        if self.clean:
            return f"{kind}, shut down cleanly: its dirty bits are believed"
        why = (
            "the kernel has marked it as needing a check"
            if self.needs_check
            else "it was not shut down cleanly"
        )
        return f"{kind}: {why}, so each mapped block counts as dirty"


def import_answer(source: str, output: str, imported: Imported) -> ImportAnswer:
    """Return what was made of `source`."""
    return ImportAnswer(
        source=source,
        format_version=imported.version,
        clean=imported.clean,
        needs_check=imported.needs_check,
        restored=restore_answer(output, imported.content, ()),
    )
