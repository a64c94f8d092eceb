# SPDX-License-Identifier: Apache-2.0
"""The power is cut after every event of a workload, and every image must be right.

And the test itself is tested: each deliberate bug in `DRIVER_MUTANTS` must make it fail, and
so must those that `make mutants` patches into the code.
"""

import random

import msgspec
import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CloneSuperblock
from nbdtarget_metadata.errors import MetadataError, NotFormatted
from nbdtarget_metadata.log.superblock import superblock_writes
from nbdtarget_metadata.operations import Flush, Steps
from tests.support.metadata.clone_workload import (
    NR_REGIONS,
    REGION_SIZE,
    TARGET_SIZE,
    UUID,
    CloneWorkload,
    Mutant,
    open_image,
)
from tests.support.metadata.store import Store, cut, drive

pytestmark = [pytest.mark.usefixtures("small_chunks"), pytest.mark.slow]

SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))]
NR_EVENTS = 800
OVERTAKING_SEED = 1
MUTANT_SEEDS = range(40)


@pytest.mark.parametrize("lazy", [False, True], ids=["compacted", "overtaken"])
@pytest.mark.parametrize("seed", SEEDS)
def test_every_crash_image_opens_at_an_acknowledged_state(
    seed: int, lazy: bool
) -> None:
    world = CloneWorkload(seed, lazy=lazy)
    world.run(NR_EVENTS)
    assert world.acknowledged > 20
    assert world.nr_moves > 1, "the workload must reach both arenas"


def test_workload_overtakes_compactions() -> None:
    # Otherwise the rarest way through `_plan` would not be tested.
    world = CloneWorkload(OVERTAKING_SEED, lazy=True)
    world.run(NR_EVENTS)
    assert world.nr_overtaken > 0


# Deliberate bugs


DRIVER_MUTANTS = {
    "superblock before the journal's flush": Mutant(journal_unflushed=True),
    "superblock without FUA": Mutant(superblock_without_fua=True),
    "superblock before the destination's flush": Mutant(
        superblock_before_destination=True
    ),
    "snapshot not flushed before the switch": Mutant(snapshot_unflushed=True),
    "acknowledged before the superblock has ended": Mutant(acknowledged_early=True),
    "one copy of the superblock": Mutant(single_copy=True),
    "opened without a flush": Mutant(opened_without_flush=True),
}


# A seed that notices a bug which most others do not: it is tried first, to save time.
FIRST_SEEDS = {"opened without a flush": 15}


def is_caught(mutant: Mutant | None = None, first: int = 0) -> bool:
    """Tell whether some seed notices; any exception will do, an oracle's or the code's."""
    for seed in (first, *MUTANT_SEEDS):
        try:
            CloneWorkload(seed, mutant, lazy=bool(seed % 2)).run(NR_EVENTS)
        except (AssertionError, MetadataError):
            return True
    return False


@pytest.mark.parametrize("name", DRIVER_MUTANTS)
def test_driver_mutant_is_caught(name: str) -> None:
    assert is_caught(DRIVER_MUTANTS[name], FIRST_SEEDS.get(name, 0))


# Formatting


def format_steps(size: int) -> Steps[CloneMetadata]:
    return CloneMetadata.format(
        device_size=size,
        region_size=REGION_SIZE,
        target_size=TARGET_SIZE,
        uuid=UUID,
    )


def format_crash_images() -> list[bytes]:
    """Return what a crash at any time while formatting may leave."""
    rng = random.Random(1)
    store = Store(CloneMetadata.device_size_min(NR_REGIONS))
    return list(cut(store, format_steps(store.size), rng))


def test_crash_while_formatting_leaves_it_formatted_or_formattable() -> None:
    opened = unformatted = 0
    for image in format_crash_images():
        try:
            metadata = open_image(image)
            opened += 1
        except NotFormatted:
            unformatted += 1
            metadata = drive(Store(len(image), image), format_steps(len(image)))
        assert (metadata.generation, metadata.nr_hydrated) == (1, 0)
    assert opened > 0
    assert unformatted > 0


def test_crash_while_formatting_is_caught_when_slots_are_written_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hasty(superblock: CloneSuperblock) -> Steps[CloneSuperblock]:
        second = msgspec.structs.replace(superblock, generation=1)
        yield (*superblock_writes(superblock), *superblock_writes(second))
        yield Flush()
        return second

    monkeypatch.setattr("nbdtarget_metadata.clone.metadata.format_superblocks", hasty)
    with pytest.raises(MetadataError):
        test_crash_while_formatting_leaves_it_formatted_or_formattable()
