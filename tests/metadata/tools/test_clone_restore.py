# SPDX-License-Identifier: Apache-2.0
"""Dump, restore, dump is identical; and a restore that is cut short is no metadata at all."""

import random

import pytest
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget_metadata.clone.content import CloneContent, read_clone_content
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import (
    MetadataError,
    MetadataTooSmall,
    NotFormatted,
    NotOurs,
    UnsupportedFormat,
)
from nbdtarget_metadata.operations import Answer, Flush, Read, Write
from nbdtarget_metadata.tools.check import examine
from nbdtarget_metadata.tools.clone_check import CLONE_CHECKS
from nbdtarget_metadata.tools.clone_dump import render_clone
from nbdtarget_metadata.tools.clone_dump_parser import parse_clone
from nbdtarget_metadata.tools.clone_restore import restore_clone
from tests.support.metadata.clone_dumps import make_content, text_of
from tests.support.metadata.clone_images import REGION_SIZE, TARGET_SIZE, ages, opening
from tests.support.metadata.report import check
from tests.support.metadata.small_clone import commit
from tests.support.metadata.store import Store, drive, read_image

SIZE = CloneMetadata.device_size_min(1200)
AGES = sorted(ages())


def content_of_age(name: str) -> CloneContent:
    image = ages()[name].image
    return read_image(image, read_clone_content(len(image)))


@pytest.mark.parametrize("size", [SIZE, SIZE + 4096, 4 << 20])
@pytest.mark.parametrize("age", AGES)
def test_dump_restore_dump_is_identical(age: str, size: int) -> None:
    text = text_of(content_of_age(age))
    store = Store(size)
    drive(store, restore_clone(parse_clone([text.encode()]), device_size=size))
    again = read_image(bytes(store.durable), read_clone_content(size))
    assert "".join(render_clone(again)) == text


@pytest.mark.parametrize("age", AGES)
def test_restored_metadata_is_in_order_and_can_be_committed_to(age: str) -> None:
    content = content_of_age(age)
    store = Store(SIZE)
    drive(store, restore_clone(content, device_size=SIZE))
    findings = drive(store, examine(CLONE_CHECKS, SIZE))
    assert (findings.damage, findings.unhealed, findings.complete) == ((), (), True)
    metadata = drive(store, opening(SIZE))
    while metadata.needs_rewrite:
        commit(store, metadata)
    assert not metadata.changed
    metadata.set_hydrated(0, 1200)
    commit(store, metadata)
    report = read_image(bytes(store.durable), check(SIZE))
    assert (report.nr_hydrated, report.generation) == (1200, content.generation + 3)


@pytest.mark.parametrize("bits", ["0" * 1200, "1" * 1200, "01" * 600])
@pytest.mark.parametrize("generation", [1, 2, 3, 1 << 62])
@pytest.mark.usefixtures("small_chunks")
def test_any_bits_and_generation_restore(bits: str, generation: int) -> None:
    content = make_content(bitarray(bits, "little"), generation=generation)
    size = 1 << 20  # small chunks take more blocks
    store = Store(size)
    drive(store, restore_clone(content, device_size=size))
    assert read_image(bytes(store.durable), read_clone_content(size)) == content


@pytest.mark.parametrize("at", [0, 4096 * 3 + 9, 4096 * 4, SIZE - 1])
def test_foreign_output_is_refused_untouched(at: int) -> None:
    store = Store(SIZE)
    store.durable[at] = 7
    before = bytes(store.durable)
    with pytest.raises(NotOurs):
        drive(store, restore_clone(content_of_age("commits"), device_size=SIZE))
    assert bytes(store.current()) == before


def test_metadata_as_output_is_refused_and_overwritten_when_told() -> None:
    image = ages()["overtaken"].image
    store = Store(len(image), image)
    content = content_of_age("commits")
    with pytest.raises(NotOurs, match="generation 3"):
        drive(store, restore_clone(content, device_size=store.size))
    assert bytes(store.current()) == image
    drive(store, restore_clone(content, device_size=store.size, overwrite=True))
    assert read_image(bytes(store.durable), read_clone_content(store.size)) == content


def test_small_output_is_refused_untouched() -> None:
    store = Store(SIZE - 4096)
    with pytest.raises(MetadataTooSmall):
        drive(store, restore_clone(content_of_age("commits"), device_size=store.size))
    assert not any(store.current())


def test_features_that_this_version_does_not_know_are_refused() -> None:
    content = make_content(zeros(10, "little"), ro_compat=4)
    with pytest.raises(UnsupportedFormat, match="0x4"):
        drive(Store(SIZE), restore_clone(content, device_size=SIZE))


def refusal(image: bytes) -> MetadataError | None:
    try:
        read_image(image, read_clone_content(len(image)))
    except MetadataError as error:
        return error
    return None


def formats(image: bytes) -> bool:
    """Whether a clone would format this image."""
    steps = CloneMetadata.format(
        device_size=len(image),
        region_size=REGION_SIZE,
        target_size=TARGET_SIZE,
        uuid=bytes(16),
    )
    try:
        drive(Store(len(image), image), steps)
    except MetadataError:
        return False
    return True


@pytest.mark.parametrize("old", ["", "overtaken"])
def test_power_cut_leaves_all_of_it_or_nothing_that_opens(old: str) -> None:
    """The power is cut at every operation, with every subset of the pending writes and some torn ones."""
    rng = random.Random(1)
    content = content_of_age("compacted")
    before = ages()[old].image if old else bytes(SIZE)
    store = Store(len(before), before)
    outcomes = set()
    steps = restore_clone(content, device_size=store.size, overwrite=bool(old))
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            break
        single = isinstance(operation, Read | Write | Flush)
        operations = (operation,) if single else operation
        tickets = [store.submit(each) for each in operations]  # type: ignore[arg-type]
        for image in store.crash_images(rng):
            error = refusal(image)
            outcomes.add(type(error).__name__ if error else "opens")
            if error is None:
                found = read_image(image, read_clone_content(len(image)))
                assert found in (content, *([content_of_age(old)] if old else []))
            elif any(image[4 * 4096 :]):
                assert not formats(image), "a clone would start anew over it"
            else:
                assert isinstance(error, NotFormatted)
        answers = tuple(store.end(ticket) for ticket in tickets)
        answer = answers[0] if single else answers
    assert refusal(bytes(store.durable)) is None
    assert {"opens", "NotFormatted", "CorruptMetadata"} <= outcomes
