# SPDX-License-Identifier: Apache-2.0
"""`examine` distinguishes damage from harmless findings; `mend` never writes over data that could be needed."""

import random

import msgspec
import pytest

from nbdtarget_metadata.clone.content import read_clone_content
from nbdtarget_metadata.errors import (
    CorruptMetadata,
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    UnknownKind,
)
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import (
    superblock_writes,
)
from nbdtarget_metadata.operations import Write
from nbdtarget_metadata.tools.check import Findings, examine, mend
from nbdtarget_metadata.tools.clone_check import CLONE_CHECKS
from nbdtarget_metadata.tools.kinds import CLONE, find_kind
from tests.support.metadata.clone_images import (
    ages,
    live_blocks,
    needing_check,
    opening,
)
from tests.support.metadata.damage import rot
from tests.support.metadata.report import check
from tests.support.metadata.store import Store, cut, drive, read_image
from tests.support.metadata.superblocks import put_body

AGES = sorted(ages())


def examined(image: bytes, **options: bool) -> Findings:
    return read_image(image, examine(CLONE_CHECKS, len(image), **options))


def opens(image: bytes) -> bool:
    try:
        read_image(image, check(len(image)))
    except MetadataError:
        return False
    return True


@pytest.mark.parametrize("age", AGES)
def test_damage_is_what_opening_refuses(age: str) -> None:
    image = ages()[age].image
    for block in range(len(image) // BLOCK_SIZE):
        changed = rot(image, block)
        assert bool(examined(changed).damage) == (not opens(changed))


@pytest.mark.parametrize(
    ("age", "unhealed", "orphans"),
    [
        ("fresh", (), 0),
        ("mid_journal", (), 1),
        ("torn_commit", (1,), 0),
        ("compacted", (), 12),
    ],
)
def test_what_a_crash_or_a_compaction_leaves_is_harmless(
    age: str, unhealed: tuple[int, ...], orphans: int
) -> None:
    findings = examined(ages()[age].image)
    assert findings.damage == ()
    assert (findings.unhealed, findings.orphans) == (unhealed, orphans)
    assert (findings.orphan_blocks, findings.leaked_blocks) == (orphans, 0)
    assert findings.complete


def test_copies_are_told_one_by_one() -> None:
    findings = examined(rot(ages()["torn_commit"].image, 0))
    states = [(copy.block, copy.generation, copy.state) for copy in findings.copies]
    assert states == [
        (0, None, "invalid"),
        (2, 4, "older"),
        (1, 5, "newest"),
        (3, 3, "stale"),
    ]
    assert "slot 0 copy 0 (block 0)" in findings.copies[0].fault


def test_leaks_are_counted_and_are_no_damage() -> None:
    image = bytearray(ages()["commits"].image)
    image[20 * BLOCK_SIZE + 100] = 1
    image[-1] = 1
    findings = examined(bytes(image))
    assert (findings.damage, findings.leaked_blocks) == ((), 2)


def test_every_broken_place_of_the_chain_is_named() -> None:
    image = ages()["compacted"].image
    live = live_blocks("compacted")
    damage = examined(rot(image, live[0], live[2], live[3])).damage
    assert f"block {live[0]}" in damage[0]
    assert damage[1:] == (
        f"no intact record in blocks {live[0]} to {live[0]}",
        f"no intact record in blocks {live[2]} to {live[3]}",
    )


def test_long_lists_of_broken_places_are_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nbdtarget_metadata.tools.check.GAPS_MAX", 1)
    image = ages()["compacted"].image
    live = live_blocks("compacted")
    damage = examined(rot(image, *live[:5:2])).damage
    assert damage[1:] == (
        f"no intact record in blocks {live[0]} to {live[0]}",
        "and in 2 more places",
    )


def test_shrunk_device_is_damage() -> None:
    findings = examined(ages()["commits"].image[: 6 * BLOCK_SIZE])
    assert "the device has 24576" in findings.damage[0]
    assert findings.damage[1] == "no intact record in blocks 6 to 6"
    assert findings.superblock is not None


def test_lost_slot_is_damage_and_copies_are_still_told() -> None:
    findings = examined(rot(ages()["commits"].image, 0, 2))
    assert "superblock slot 0" in findings.damage[0]
    assert findings.superblock is None
    assert [copy.state for copy in findings.copies] == 2 * ["invalid"] + 2 * ["newest"]


def test_parts_can_be_left_out() -> None:
    image = rot(ages()["compacted"].image, live_blocks("compacted")[0])
    findings = examined(image, records=False, unused=False)
    assert (findings.damage, findings.orphans, findings.complete) == ((), 0, False)
    findings = examined(image, unused=False)
    assert (len(findings.damage), findings.orphans, findings.complete) == (2, 0, False)


def test_what_is_no_metadata_is_refused_by_name() -> None:
    with pytest.raises(NotFormatted):
        examined(bytes(1 << 16))
    with pytest.raises(MetadataTooSmall):
        examined(bytes(100))
    with pytest.raises(NotOurs, match="block 0"):
        examined(b"x" * 100)
    with pytest.raises(NotOurs):
        examined(random.Random(0).randbytes(1 << 16))


def test_kind_is_found_by_its_tag() -> None:
    image = ages()["commits"].image
    assert read_image(image, find_kind(len(image))) is CLONE
    assert read_image(bytes(1 << 16), find_kind(1 << 16)) is CLONE
    other = bytes(put_body(msgspec.msgpack.encode(["thin", 1])))
    with pytest.raises(UnknownKind, match="kind 'thin'"):
        read_image(other, find_kind(len(other)))


# mend


def mended(image: bytes, *, heal: bool, clear: bool) -> tuple[bytes, tuple[str, ...]]:
    store = Store(len(image), image)
    done = drive(
        store, mend(CLONE_CHECKS, store.size, heal=heal, clear_needs_check=clear)
    )
    if not done:
        assert not any(isinstance(each, Write) for each in store.log)
    assert bytes(store.current()) == bytes(store.durable)
    return bytes(store.durable), done


@pytest.mark.parametrize("age", sorted({*AGES} - {"torn_commit"}))
def test_healthy_metadata_is_not_written(age: str) -> None:
    image = ages()[age].image
    assert mended(image, heal=True, clear=True) == (image, ())


@pytest.mark.parametrize("clean", [False, True])
def test_needs_check_is_cleared_and_nothing_else(clean: bool) -> None:
    image = needing_check("compacted", clean=clean)
    assert not opens(image)
    assert examined(image).needs_check
    assert examined(image).damage == ()
    before = read_image(image, read_clone_content(len(image)))
    after, done = mended(image, heal=False, clear=True)
    assert done == ("needs_check is cleared",)
    metadata = read_image(after, opening(len(after)))
    assert metadata.clean_shutdown == clean
    assert metadata.generation == before.generation + 1
    assert metadata.hydrated == before.hydrated


def test_needs_check_stays_if_there_is_damage() -> None:
    image = rot(needing_check("compacted"), live_blocks("compacted")[0])
    store = Store(len(image), image)
    with pytest.raises(CorruptMetadata, match="no damage"):
        drive(store, mend(CLONE_CHECKS, store.size, heal=True, clear_needs_check=True))
    assert bytes(store.current()) == image


@pytest.mark.parametrize("copy", [0, 1, 2, 3])
@pytest.mark.parametrize("age", AGES)
def test_healing_gives_each_slot_two_good_copies(age: str, copy: int) -> None:
    image = rot(ages()[age].image, copy)
    if not opens(image):
        return
    before = read_image(image, read_clone_content(len(image)))
    after, done = mended(image, heal=True, clear=False)
    assert done
    assert examined(after).unhealed == ()
    assert read_image(after, read_clone_content(len(after))) == before
    assert after[4 * BLOCK_SIZE :] == image[4 * BLOCK_SIZE :]


def test_power_cut_while_mending_loses_nothing() -> None:
    rng = random.Random(3)
    image = rot(needing_check("torn_commit"), 3)
    bits = read_image(image, read_clone_content(len(image))).hydrated
    store = Store(len(image), image)
    steps = mend(CLONE_CHECKS, store.size, heal=True, clear_needs_check=True)
    nr_images = 0
    for crashed in cut(store, steps, rng):
        nr_images += 1
        content = read_image(crashed, read_clone_content(len(crashed)))
        assert content.hydrated == bits
    assert nr_images > 8
    assert opens(bytes(store.durable))


def test_count_that_does_not_fit_is_told_once() -> None:
    aged = ages()["commits"]
    store = Store(len(aged.image), aged.image)
    superblock = aged.superblock()
    wrong = msgspec.structs.replace(superblock, nr_hydrated=superblock.nr_hydrated + 1)
    for write in superblock_writes(wrong):
        store.do(write)
    (line,) = examined(bytes(store.durable)).damage
    assert "number of hydrated regions" in line
