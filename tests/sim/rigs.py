# SPDX-License-Identifier: Apache-2.0
"""What a simulated machine serves: disks by name, one table over them, what may be said to it.

A new target gets its simulation by a function here that draws a `Rig`, and its name in RIGS.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Final

from metadata.check import check
from metadata.clone import CloneMetadata
from metadata.errors import NotFormatted
from metadata.operations import Read, Steps
from tests.crash.rigs import CONTENT, DISK_SIZE, REGION_SIZE
from tests.support.model import SECTOR

__all__ = ["RIGS", "Disk", "Rig", "Role"]


class Role(Enum):
    """What a disk is for."""

    DATA = "data"
    SOURCE = "source"  # must never change
    METADATA = "metadata"  # must always pass its check


@dataclass(frozen=True)
class Disk:
    """One disk; `content` is what it holds at first, None: garbage."""

    name: str
    size: int
    role: Role = Role.DATA
    content: bytes | None = None


@dataclass(frozen=True)
class Rig:
    """See the module head.

    Args:
        table: of the one mapped device.
        content: what clients read before anybody has written.
        messages: (sector, words), any of which may be sent at any time.
        region_size: bytes; the unit that the target thinks in.
    """

    name: str
    table: str
    content: bytes
    disks: tuple[Disk, ...]
    messages: tuple[tuple[int, tuple[str, ...]], ...] = ()
    region_size: int = REGION_SIZE

    def check_disk(self, disk: Disk, image: bytes, has_booted: bool) -> None:
        """Hold what is on a disk, at any moment, against its role. Raises: any error."""
        if disk.role is Role.SOURCE:
            assert image == disk.content, f"{disk.name} was written"
        elif disk.role is Role.METADATA and any(image):
            try:
                _run_over(image, check(len(image)))
            except NotFormatted:
                assert not has_booted, f"{disk.name}: the metadata is gone"

    def check_status(self, lines: list[str]) -> None:
        """No disk fails here: everything is read-write for ever."""
        for line in lines:
            words = line.split()
            assert not words or words[-1] == "rw", f"status: {line}"


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


def _clone_disks(suffix: str, content: bytes) -> tuple[Disk, ...]:
    nr_regions = -(-len(content) // REGION_SIZE)
    # The smallest that works: compactions come often.
    size = CloneMetadata.device_size_min(nr_regions)
    return (
        Disk("/metadata" + suffix, size, Role.METADATA, bytes(size)),
        Disk("/destination" + suffix, len(content)),
        Disk("/source" + suffix, len(content), Role.SOURCE, content),
    )


def _clone_words(rng: random.Random) -> str:
    features = [
        word for word in ("no_hydration", "no_discard_passdown") if rng.random() < 0.2
    ]
    threshold, batch = rng.randrange(1, 6), rng.randrange(1, 5)
    return (
        f"{REGION_SIZE // SECTOR} {len(features)} {' '.join(features)}"
        f" 4 hydration_threshold {threshold} hydration_batch_size {batch}"
    )


def _clone_messages(sector: int) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple(
        (sector, words)
        for words in (
            ("enable_hydration",),
            ("enable_hydration",),
            ("disable_hydration",),
            ("hydration_threshold", "0"),
            ("hydration_threshold", "4"),
            ("hydration_batch_size", "3"),
        )
    )


def clone(rng: random.Random) -> Rig:
    """One clone."""
    sectors = DISK_SIZE // SECTOR
    return Rig(
        "clone",
        f"0 {sectors} clone /metadata /destination /source {_clone_words(rng)}",
        CONTENT,
        _clone_disks("", CONTENT),
        _clone_messages(0),
    )


def two_clones(rng: random.Random) -> Rig:
    """Two clones side by side in one table, and a linear target behind them."""
    sectors = DISK_SIZE // SECTOR
    content = CONTENT[::-1]
    tail = bytes(range(256)) * (8 * SECTOR // 256)
    return Rig(
        "two_clones",
        f"0 {sectors} clone /metadata1 /destination1 /source1 {_clone_words(rng)}\n"
        f"{sectors} {sectors} clone /metadata2 /destination2 /source2"
        f" {_clone_words(rng)}\n"
        f"{2 * sectors} {len(tail) // SECTOR} linear /tail 0",
        CONTENT + content + tail,
        (
            *_clone_disks("1", CONTENT),
            *_clone_disks("2", content),
            Disk("/tail", len(tail), content=tail),
        ),
        (*_clone_messages(0), *_clone_messages(sectors)),
    )


def linear(rng: random.Random) -> Rig:
    """The machine's own check: a table that adds nothing to a disk."""
    return Rig(
        "linear",
        f"0 {DISK_SIZE // SECTOR} linear /disk 0",
        CONTENT,
        (Disk("/disk", DISK_SIZE, content=CONTENT),),
    )


RIGS: Final[dict[str, tuple[Callable[[random.Random], Rig], int]]] = {
    # Each with how often it is drawn.
    "clone": (clone, 7),
    "two_clones": (two_clones, 2),
    "linear": (linear, 1),
}
