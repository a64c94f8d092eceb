# SPDX-License-Identifier: Apache-2.0
"""The devices of a simulated machine: disks by name, tables over them, and the messages that they take.

A new target gets its simulation by a function that draws a `Rig`, and its name in
`tests.sim.catalog`.

A rig is one mapped device, `d`, which clients use, and below it perhaps others (`below`), so
that tables stack. One of these may be a `powercut` target. At a cut, a device that stands on it sees
one of two things:

    nothing      what lies between it and the clients keeps no state of its own: to them
                 the disk has lost what they had not flushed, and all goes on
    the end      a clone stands on it. It believes its bits, and what they say was lost:
                 it must be started anew, as after any power cut (`starts_anew`)
"""

import random
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import Final

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import NotFormatted
from nbdtarget_metadata.operations import Read, Steps
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import examine, mend
from tests.support.crash.images import run_over
from tests.support.crash.rigs import CONTENT, DISK_SIZE, REGION_SIZE
from tests.support.metadata.report import check
from tests.support.model import SECTOR

__all__ = [
    "BACKEND",
    "SECTORS",
    "Disk",
    "Message",
    "Rig",
    "Role",
    "clone",
    "clone_disks",
    "clone_line",
    "clone_messages",
    "clone_over_powercut",
    "linear",
    "one_disk",
    "powercut_over_clone",
    "sandwich",
    "striped_over_clones",
    "two_clones",
]

SECTORS: Final = DISK_SIZE // SECTOR
BACKEND: Final = "nbd://"  # a disk called "/name" is "nbd://name/" behind a server


Message = tuple[str, int, tuple[str, ...]]  # to which device and sector, and its words


class Role(Enum):
    """The use of a disk."""

    DATA = "data"
    SOURCE = "source"  # must never change
    METADATA = "metadata"  # must always pass its check


@dataclass(frozen=True)
class Disk:
    """One disk; `content` is what it holds at first, None: garbage.

    Args:
        metadata_size: the bytes at the beginning that are metadata; 0: all, if it is for that.
        is_cache: these are a cache's.
    """

    name: str
    size: int
    role: Role = Role.DATA
    content: bytes | None = None
    metadata_size: int = 0
    is_cache: bool = False


@dataclass(frozen=True)
class Rig:
    """See the module head.

    Args:
        table: of the mapped device `d`.
        content: what clients read before anybody has written.
        messages: any of which may be sent at any time.
        region_size: bytes; the unit that the target thinks in.
        below: (name, table) of the mapped devices that `d` stands on, lower ones first.
        powercut: the one of them that is a powercut target, or "".
        starts_anew: what stands on it must be, after a cut; see the module head.
        others: tables that `d` may be reloaded with, instead of its own.
        refusals: errnos with which a message may be refused.
        discards_last: see `DiskModel`.
        backends: names of the disks that other machines have, behind NBD servers.
    """

    name: str
    table: str
    content: bytes
    disks: tuple[Disk, ...]
    messages: tuple[Message, ...] = ()
    region_size: int = REGION_SIZE
    below: tuple[tuple[str, str], ...] = ()
    powercut: str = ""
    starts_anew: bool = False
    others: tuple[str, ...] = ()
    refusals: tuple[int, ...] = ()
    discards_last: bool = False
    backends: tuple[str, ...] = ()

    @property
    def has_metadata(self) -> bool:
        return any(disk.role is Role.METADATA for disk in self.disks)

    @property
    def uncached(self) -> str:
        """The table of `d` when its cache is gone; empty if it has none."""
        words = self.table.split(" ")
        return f"0 {words[1]} linear {words[5]} 0" if words[2] == "cache" else ""

    @property
    def tables(self) -> dict[str, str]:
        """The table of each mapped device, lower ones first."""
        return {**dict(self.below), "d": self.table}

    def check_disk(self, disk: Disk, image: bytes, has_booted: bool) -> None:
        """Hold what is on a disk, at any moment, against its role. Raises: any error."""
        if disk.role is Role.SOURCE:
            assert image == disk.content, f"{disk.name} was written"
        elif disk.role is Role.METADATA:
            self._check_metadata(disk, image[: disk.metadata_size or None], has_booted)

    def repaired(self, disk: Disk, image: bytes) -> bytes:
        """Return a disk's image after an administrator has cleared `needs_check` between two lives."""
        if not disk.is_cache or not any(image):
            return image
        with suppress(NotFormatted):
            if run_over(
                bytearray(image), examine(CACHE_CHECKS, len(image))
            ).needs_check:
                mended = bytearray(image)
                mending = mend(
                    CACHE_CHECKS,
                    len(image),
                    heal=False,
                    clear_needs_check=True,
                )
                run_over(mended, mending)
                return bytes(mended)
        return image

    def _check_metadata(self, disk: Disk, image: bytes, has_booted: bool) -> None:
        if any(image):
            try:
                if disk.is_cache:
                    found = run_over(
                        bytearray(image),
                        examine(CACHE_CHECKS, len(image)),
                    )
                    assert not found.damage, (disk.name, found.damage)
                else:
                    _run_over(image, check(len(image)))
            except NotFormatted:
                assert not has_booted, f"{disk.name}: the metadata is gone"

    def check_status(self, lines: list[tuple[str, str]]) -> None:
        """Hold (type, params) against a machine without a bad disk: read-write for ever."""
        for type_name, params in lines:
            assert params != "Fail", type_name
            assert type_name != "clone" or params.split()[-1] == "rw", params
            assert type_name != "cache" or params.endswith(" rw - "), params


def _run_over(image: bytes, steps: Steps[object]) -> None:
    """Run steps that only read, over an image."""
    answer: bytes | tuple[bytes, ...] | None = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            return
        if isinstance(operation, Read):
            answer = _slice(image, operation)
        else:
            assert isinstance(operation, tuple)
            answer = tuple(_slice(image, each) for each in operation)


def _slice(image: bytes, operation: object) -> bytes:
    assert isinstance(operation, Read), "a check writes nothing"
    return image[operation.offset : operation.offset + operation.length]


def clone_disks(suffix: str, content: bytes) -> tuple[Disk, ...]:
    nr_regions = -(-len(content) // REGION_SIZE)
    # The smallest that works: compactions come often.
    size = CloneMetadata.device_size_min(nr_regions)
    return (
        Disk("/metadata" + suffix, size, Role.METADATA, bytes(size)),
        Disk("/destination" + suffix, len(content)),
        Disk("/source" + suffix, len(content), Role.SOURCE, content),
    )


def clone_line(
    rng: random.Random,
    suffix: str = "",
    *,
    metadata: str = "",
    destination: str = "",
) -> str:
    """Return a table line without its `start length`; the disks are those of `clone_disks`, or others by name."""
    kinds = ("no_hydration", "no_discard_passdown", "hydrate_on_read", "then_linear")
    features = [word for word in kinds if rng.random() < 0.2]
    threshold, batch = rng.randrange(1, 6), rng.randrange(1, 5)
    return (
        f"clone {metadata or '/metadata' + suffix} {destination or '/destination' + suffix}"
        f" /source{suffix} {REGION_SIZE // SECTOR} {len(features)} {' '.join(features)}"
        f" 4 hydration_threshold {threshold} hydration_batch_size {batch}"
    )


def clone_messages(device: str = "d", sector: int = 0) -> tuple[Message, ...]:
    return tuple(
        (device, sector, words)
        for words in (
            ("enable_hydration",),
            ("enable_hydration",),
            ("disable_hydration",),
            ("hydration_threshold", "0"),
            ("hydration_threshold", "4"),
            ("hydration_batch_size", "3"),
            ("then_linear",),
            ("disable_then_linear",),
        )
    )


def _powercut_line(rng: random.Random, device: str) -> str:
    features = ""
    if rng.random() < 0.5:
        words = ["volatile_cache_max", str(rng.choice((1, 8, 40)))]
        if rng.random() < 0.5:
            words += ["tear_size", "4096"]
        features = f" {len(words)} {' '.join(words)}"
    return f"powercut {device} 0{features}"


def _passing_line(rng: random.Random, device: str) -> str:
    """A target that only passes bios on, over all of another mapped device."""
    kind = rng.randrange(3)
    if kind == 0:
        return f"linear /dev/mapper/{device} 0"
    read_ms, write_ms, flush_ms = (rng.choice((0, 1, 30)) for _ in range(3))
    if kind == 1:
        return f"delay /dev/mapper/{device} 0 {read_ms}"
    return (
        f"delay /dev/mapper/{device} 0 {read_ms} /dev/mapper/{device} 0 {write_ms}"
        f" /dev/mapper/{device} 0 {flush_ms}"
    )


def clone(rng: random.Random) -> Rig:
    """One clone."""
    return Rig(
        "clone",
        f"0 {SECTORS} {clone_line(rng)}",
        CONTENT,
        clone_disks("", CONTENT),
        clone_messages(),
    )


def two_clones(rng: random.Random) -> Rig:
    """Two clones side by side in one table, and a linear target behind them."""
    content = CONTENT[::-1]
    tail = bytes(range(256)) * (8 * SECTOR // 256)
    return Rig(
        "two_clones",
        f"0 {SECTORS} {clone_line(rng, '1')}\n"
        f"{SECTORS} {SECTORS} {clone_line(rng, '2')}\n"
        f"{2 * SECTORS} {len(tail) // SECTOR} linear /tail 0",
        CONTENT + content + tail,
        (
            *clone_disks("1", CONTENT),
            *clone_disks("2", content),
            Disk("/tail", len(tail), content=tail),
        ),
        (*clone_messages(), *clone_messages(sector=SECTORS)),
    )


def linear(rng: random.Random) -> Rig:
    """The machine's own check: a table that adds nothing to a disk."""
    return Rig(
        "linear",
        f"0 {SECTORS} linear /disk 0",
        CONTENT,
        (Disk("/disk", DISK_SIZE, content=CONTENT),),
    )


def clone_over_powercut(rng: random.Random) -> Rig:
    """A clone whose destination, and by seed its metadata, may lose power without the rest."""
    disks = clone_disks("", CONTENT)
    below = [
        ("cache", f"0 {SECTORS} {_powercut_line(rng, '/destination')}"),
        ("low", f"0 {SECTORS} linear /dev/mapper/cache 0"),
    ]
    metadata = ""
    if rng.random() < 0.3:
        metadata = "/dev/mapper/meta"
        below.append(("meta", f"0 {disks[0].size // SECTOR} linear /metadata 0"))
    line = clone_line(rng, metadata=metadata, destination="/dev/mapper/low")
    return Rig(
        "clone_over_powercut",
        f"0 {SECTORS} {line}",
        CONTENT,
        disks,
        clone_messages(),
        below=tuple(below),
        powercut="cache",
        starts_anew=True,
    )


def powercut_over_clone(rng: random.Random) -> Rig:
    """A disk that may lose unflushed writes, over a clone that hydrates meanwhile."""
    return Rig(
        "powercut_over_clone",
        f"0 {SECTORS} {_passing_line(rng, 'cache')}",
        CONTENT,
        clone_disks("", CONTENT),
        clone_messages("clone"),
        below=(
            ("clone", f"0 {SECTORS} {clone_line(rng)}"),
            ("cache", f"0 {SECTORS} {_powercut_line(rng, '/dev/mapper/clone')}"),
        ),
        powercut="cache",
    )


def one_disk(rng: random.Random) -> Rig:
    """Metadata and destination are parts of one disk, whose write cache may lose power, too."""
    metadata, _, source = clone_disks("", CONTENT)
    size = metadata.size + DISK_SIZE
    content = bytes(metadata.size) + b"\xee" * DISK_SIZE
    disk, below = "/disk", []
    has_cache = rng.random() < 0.5
    if has_cache:
        disk = "/dev/mapper/cache"
        below = [("cache", f"0 {size // SECTOR} {_powercut_line(rng, '/disk')}")]
    begin = metadata.size // SECTOR
    below += [
        ("meta", f"0 {begin} linear {disk} 0"),
        ("low", f"0 {SECTORS} linear {disk} {begin}"),
    ]
    line = clone_line(rng, metadata="/dev/mapper/meta", destination="/dev/mapper/low")
    return Rig(
        "one_disk",
        f"0 {SECTORS} {line}",
        CONTENT,
        (Disk("/disk", size, Role.METADATA, content, metadata.size), source),
        clone_messages(),
        below=tuple(below),
        powercut="cache" if has_cache else "",
        starts_anew=has_cache,
    )


def sandwich(rng: random.Random) -> Rig:
    """linear or delay over a clone over linear or delay."""
    low = f"0 {SECTORS} linear /destination 0"
    return Rig(
        "sandwich",
        f"0 {SECTORS} {_passing_line(rng, 'clone')}",
        CONTENT,
        clone_disks("", CONTENT),
        clone_messages("clone"),
        below=(
            ("lowest", low),
            ("low", f"0 {SECTORS} {_passing_line(rng, 'lowest')}"),
            (
                "clone",
                f"0 {SECTORS} {clone_line(rng, destination='/dev/mapper/low')}",
            ),
        ),
    )


def striped_over_clones(rng: random.Random) -> Rig:
    """Two clones that make one disk, chunk by chunk."""
    size = DISK_SIZE // REGION_SIZE * REGION_SIZE
    left, right = CONTENT[:size], CONTENT[::-1][:size]
    chunk = rng.choice((SECTOR, REGION_SIZE // 2, REGION_SIZE))
    content = b"".join(
        side[at : at + chunk] for at in range(0, size, chunk) for side in (left, right)
    )
    sectors = size // SECTOR
    return Rig(
        "striped_over_clones",
        f"0 {2 * sectors} striped 2 {chunk // SECTOR}"
        " /dev/mapper/left 0 /dev/mapper/right 0",
        content,
        (*clone_disks("1", left), *clone_disks("2", right)),
        (*clone_messages("left"), *clone_messages("right")),
        below=(
            ("left", f"0 {sectors} {clone_line(rng, '1')}"),
            ("right", f"0 {sectors} {clone_line(rng, '2')}"),
        ),
    )
