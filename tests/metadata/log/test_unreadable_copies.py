# SPDX-License-Identifier: Apache-2.0
"""A disk that cannot read a sector, or loses the one that it was writing: one copy is at fault, not more.

Whole metadata are opened here, not superblocks alone: with bits, and a journal that grows again.
"""

import random
from itertools import product

import pytest

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import CorruptMetadata, MetadataError
from nbdtarget_metadata.log.envelope import BLOCK_SIZE
from nbdtarget_metadata.log.superblock import (
    NR_COPIES,
    SUPERBLOCK_BLOCKS,
    superblock_block,
)
from nbdtarget_metadata.operations import (
    UNREADABLE,
    Answer,
    Flush,
    Read,
    Steps,
    TryRead,
    Write,
)
from nbdtarget_metadata.tools.check import Findings, examine
from nbdtarget_metadata.tools.clone_check import CLONE_CHECKS
from tests.support.metadata.small_clone import SIZE, commit, format_on, open_on
from tests.support.metadata.store import Store, Ticket, cut, drive

pytestmark = pytest.mark.slow

N = 4  # the generation under way: slot 0
BLOCKS = range(SUPERBLOCK_BLOCKS)
GARBAGE = b"\xa5" * BLOCK_SIZE


class Unreadable(Exception):
    """The error of a device, which ends the run."""


class RottenStore(Store):
    """A disk that cannot read some blocks, until they are written again."""

    def __init__(self, content: bytes, unreadable: set[int]) -> None:
        super().__init__(len(content), content)
        self.unreadable = unreadable

    def end(self, ticket: Ticket) -> Answer:
        operation = ticket.operation
        if isinstance(operation, Read):
            begin = operation.offset // BLOCK_SIZE
            end = -(-(operation.offset + operation.length) // BLOCK_SIZE)
            if self.unreadable & set(range(begin, end)):
                if isinstance(operation, TryRead):
                    return UNREADABLE
                raise Unreadable
        if isinstance(operation, Write):
            first = operation.offset // BLOCK_SIZE
            blocks = -(-len(operation.data) // BLOCK_SIZE)
            self.unreadable -= set(range(first, first + blocks))
        return super().end(ticket)


def life(copies: int) -> bytes:
    """Generation N - 1 is committed with regions 0 to 2, N with 3 in so many copies."""
    store = Store(SIZE)
    metadata = format_on(store)
    for region in range(N - 2):
        metadata.set_hydrated(region, region + 1)
        commit(store, metadata)
    metadata.set_hydrated(N - 2, N - 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    assert transaction.generation == N
    drive(store, transaction.journal())
    for write, _ in zip(transaction.superblock(), range(copies), strict=False):
        assert isinstance(write, Write)
        store.do(write)
    return bytes(store.durable)


def expected(copies: int, bad: set[int]) -> int | None:
    """The generation that must open; None: refused, because a slot has no copy left."""
    for slot in range(2):
        if {superblock_block(slot, copy) for copy in range(NR_COPIES)} <= bad:
            return None
    written = {superblock_block(N % 2, copy) for copy in range(copies)}
    return N if written - bad else N - 1


def spoiled(image: bytes, bad: set[int], how: str) -> RottenStore:
    if how == "unreadable":
        return RottenStore(image, set(bad))
    data = bytearray(image)
    for block in bad:
        data[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE] = GARBAGE
    return RottenStore(bytes(data), set())


@pytest.mark.parametrize("how", ["unreadable", "garbage"])
@pytest.mark.parametrize("copies", range(NR_COPIES + 1))
def test_metadata_opens_at_the_newest_slot_with_a_good_copy(
    copies: int, how: str
) -> None:
    image = life(copies)
    for flags in product((False, True), repeat=SUPERBLOCK_BLOCKS):
        bad = {block for block in BLOCKS if flags[block]}
        store = spoiled(image, bad, how)
        generation = expected(copies, bad)
        if len(bad) == SUPERBLOCK_BLOCKS:
            with pytest.raises(
                (Unreadable, MetadataError)
            ):  # the disk's fault, or no metadata
                open_on(store)
        elif generation is None:
            with pytest.raises(CorruptMetadata, match=r"block \d") as caught:
                open_on(store)
            assert how == "garbage" or "cannot be read" in str(caught.value)
        else:
            metadata = open_on(store)
            assert metadata.generation == generation
            assert metadata.nr_hydrated == generation - 1
            assert all(metadata.hydrated[: generation - 1])


@pytest.mark.parametrize("block", BLOCKS)
def test_check_says_that_an_unreadable_copy_is_a_fault_of_that_copy(block: int) -> None:
    store = RottenStore(life(2), {block})
    findings: Findings = drive(store, examine(CLONE_CHECKS, SIZE))
    assert findings.damage == ()
    assert findings.unhealed == (block % 2,)
    faults = {each.block: each.fault for each in findings.copies if each.fault}
    assert list(faults) == [block]
    assert faults[block].endswith(f"(block {block}) cannot be read")


def rewrite(store: Store, metadata: CloneMetadata) -> None:
    while metadata.needs_rewrite:
        commit(store, metadata)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("copies", range(NR_COPIES + 1))
def test_both_slots_are_good_again_after_the_commits_of_the_first_resume(
    copies: int, block: int
) -> None:
    store = RottenStore(life(copies), {block})
    metadata = open_on(store)
    rewrite(store, metadata)
    assert store.unreadable == set()
    findings: Findings = drive(store, examine(CLONE_CHECKS, SIZE))
    assert (findings.damage, findings.unhealed) == ((), ())


@pytest.mark.parametrize("copies", range(NR_COPIES + 1))
@pytest.mark.parametrize("block", BLOCKS)
def test_copy_that_becomes_readable_later_is_not_believed(
    copies: int, block: int
) -> None:
    """The copy may be the only one of a commit that was never acknowledged, and its records may be overwritten."""
    store = RottenStore(life(copies), {block})
    metadata = open_on(store)
    opened = metadata.generation

    def later() -> Steps[None]:
        while metadata.needs_rewrite:
            yield from _whole_commit(metadata)
        for region in range(10, 14):
            metadata.set_hydrated(region, region + 1)
            yield from _whole_commit(metadata)

    nr_images = 0
    for image in cut(store, later(), random.Random(block)):
        again = open_on(Store(SIZE, image))  # every copy can be read again
        assert again.generation >= opened
        nr_images += 1
    assert nr_images > 20


def _whole_commit(metadata: CloneMetadata) -> Steps[None]:
    transaction = metadata.pre_commit()
    assert transaction is not None
    yield from transaction.journal()
    yield from transaction.superblock()
    transaction.done()


@pytest.mark.parametrize("writes_at_once", [1, 2])
def test_a_power_cut_that_spoils_the_sectors_being_written_leaves_a_copy(
    writes_at_once: int,
) -> None:
    """A power cut may spoil both copies if both are being written. So the copies are written one after the other."""
    store = Store(SIZE)
    metadata = format_on(store)
    refused = 0
    for region in range(4):
        metadata.set_hydrated(region, region + 1)
        transaction = metadata.pre_commit()
        assert transaction is not None
        drive(store, transaction.journal())
        operations = list(transaction.superblock())
        for at in range(0, len(operations), writes_at_once):
            under_way = operations[at : at + writes_at_once]
            assert all(isinstance(each, Write) and each.fua for each in under_way)
            image = bytearray(store.durable)
            for each in under_way:
                assert isinstance(each, Write)
                image[each.offset : each.offset + BLOCK_SIZE] = GARBAGE
            try:
                open_on(Store(SIZE, bytes(image)))
            except CorruptMetadata:
                refused += 1
            for each in under_way:
                assert isinstance(each, Write)
                store.do(each)
        transaction.done()
    assert bool(refused) == (writes_at_once == 2)


def test_the_copies_of_a_superblock_are_one_operation_each() -> None:
    store = Store(SIZE)
    metadata = format_on(store)
    metadata.set_hydrated(0, 1)
    transaction = metadata.pre_commit()
    assert transaction is not None
    drive(store, transaction.journal())
    operations = list(transaction.superblock())
    assert [type(each) for each in operations] == [Write, Write]
    assert not any(isinstance(each, Flush) for each in operations)
