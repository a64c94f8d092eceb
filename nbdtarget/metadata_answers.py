# SPDX-License-Identifier: Apache-2.0
"""What the offline metadata tools answer: for people as text, for programs as JSON."""

from typing import Final

import msgspec

from metadata.check import CopyState

__all__ = [
    "UNITS",
    "UNIT_LETTERS",
    "CheckAnswer",
    "InfoAnswer",
    "RestoreAnswer",
    "SizeAnswer",
]

# What `size` prints in; as in the tools for the kernel's caches.
UNITS: Final = {
    "bytes": 1,
    "sectors": 512,
    "kibibytes": 1 << 10,
    "mebibytes": 1 << 20,
    "gibibytes": 1 << 30,
    "tebibytes": 1 << 40,
    "kilobytes": 10**3,
    "megabytes": 10**6,
    "gigabytes": 10**9,
    "terabytes": 10**12,
}
UNIT_LETTERS: Final = {
    "b": "bytes",
    "s": "sectors",
    "k": "kibibytes",
    "m": "mebibytes",
    "g": "gibibytes",
    "t": "tebibytes",
    "K": "kilobytes",
    "M": "megabytes",
    "G": "gigabytes",
    "T": "terabytes",
}


class InfoAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What the newest superblock says. Sizes are bytes, arenas and their parts 4 KiB blocks.

    `degraded`: superblock copies that are not as they should be, for people.
    """

    file: str
    kind: str
    format_version: int
    uuid: str
    generation: int
    flags: list[str]
    region_size: int
    target_size: int
    nr_regions: int
    nr_hydrated: int
    nr_commits: int
    nr_compactions: int
    device_size: int
    arena: int
    arena_blocks: int
    snapshot_blocks: int
    journal_blocks: int
    journal_blocks_max: int
    degraded: list[str]

    def __str__(self) -> str:
        percent = 100 * self.nr_hydrated / self.nr_regions
        rows = [
            ("Kind", f"{self.kind}, format version {self.format_version}"),
            ("UUID", self.uuid),
            ("Generation", str(self.generation)),
            ("Flags", " ".join(self.flags) or "none"),
            ("Region size", _size_text(self.region_size)),
            ("Target size", _size_text(self.target_size)),
            ("Hydrated", f"{self.nr_hydrated}/{self.nr_regions} ({percent:.1f} %)"),
            ("Commits", f"{self.nr_commits}, of which {self.nr_compactions} compacted"),
            ("Metadata size", _size_text(self.device_size)),
            ("Arena", f"{self.arena}, of {self.arena_blocks} blocks"),
            ("Snapshot", f"{self.snapshot_blocks} blocks"),
            ("Journal", f"{self.journal_blocks} of {self.journal_blocks_max} blocks"),
            *(("Degraded", each) for each in self.degraded),
        ]
        return "\n".join(f"{name + ':':<16}{value}" for name, value in rows)


class CheckAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What `check` found and did; `metadata.check` defines the words.

    `complete`: everything was looked at. `done`: what was written.
    """

    file: str
    kind: str
    uuid: str | None
    generation: int | None
    nr_regions: int | None
    nr_hydrated: int | None
    needs_check: bool
    complete: bool
    damage: tuple[str, ...]
    copies: tuple[CopyState, ...]
    orphans: int
    orphan_blocks: int
    leaked_blocks: int
    done: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.file}: {self._headline()}"]
        for copy in self.copies:
            state = copy.fault or f"generation {copy.generation}, {copy.state}"
            lines.append(
                f"  superblock slot {copy.slot} copy {copy.copy} (block {copy.block}):"
                f" {state}"
            )
        if self.nr_regions is not None:
            lines.append(f"  {self.nr_hydrated} of {self.nr_regions} regions hydrated")
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
            return f"{self.kind} metadata, damaged"
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


class RestoreAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """What was written. `nr_lost` as in a dump; `damage`: of the input of a repair."""

    file: str
    kind: str
    uuid: str
    generation: int
    nr_regions: int
    nr_hydrated: int
    nr_lost: int | None
    damage: tuple[str, ...]

    def __str__(self) -> str:
        return (
            f"{self.file}: {self.kind} metadata {self.uuid}, generation"
            f" {self.generation}: {self.nr_hydrated} of {self.nr_regions} regions"
            f" hydrated{self._lost()}"
        )

    def _lost(self) -> str:
        if self.nr_lost is None:
            return ", nobody knows how many are lost"
        if self.nr_lost:
            return f", {self.nr_lost} are lost"
        return ", nothing is lost" if self.damage else ""


class SizeAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """How large metadata is, in bytes."""

    nr_regions: int
    smallest: int
    preferred: int


def _size_text(size: int) -> str:
    for shift, unit in ((40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >> shift and not size & ((1 << shift) - 1):
            return f"{size >> shift} {unit} ({size} bytes)"
    return f"{size} bytes"
