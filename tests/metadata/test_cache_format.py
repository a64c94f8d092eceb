# SPDX-License-Identifier: Apache-2.0
"""A crash while a cache's metadata is formatted."""

import random

from metadata.cache import CacheMetadata
from metadata.errors import NotFormatted
from metadata.operations import Answer, Flush, Read, Write
from tests.metadata.cache_small import (
    BLOCK_SIZE,
    NR_CBLOCKS,
    ORIGIN_SIZE,
    SIZE,
    UUID,
    format_on,
    open_on,
)
from tests.metadata.store import Store


def format_crash_images() -> list[bytes]:
    """Return what a crash at any time while formatting may leave."""
    rng = random.Random(1)
    store = Store(SIZE)
    steps = CacheMetadata.format(
        device_size=SIZE,
        block_size=BLOCK_SIZE,
        origin_size=ORIGIN_SIZE,
        nr_cblocks=NR_CBLOCKS,
        uuid=UUID,
    )
    images: list[bytes] = []
    answer: Answer | tuple[Answer, ...] = None
    try:
        while True:
            operation = steps.send(answer)
            if isinstance(operation, Read | Write | Flush):
                answer = store.do(operation)
            else:
                tickets = [store.submit(each) for each in operation]
                images.extend(store.crash_images(rng))
                answer = tuple(store.end(ticket) for ticket in tickets)
            images.extend(store.crash_images(rng))
    except StopIteration:
        return images


def test_crash_while_formatting_leaves_it_formatted_or_formattable() -> None:
    opened = unformatted = 0
    for image in format_crash_images():
        try:
            metadata = open_on(Store(SIZE, image))
            opened += 1
        except NotFormatted:
            metadata = format_on(Store(SIZE, image))
            unformatted += 1
        assert (metadata.generation, metadata.nr_mapped) == (1, 0)
    assert opened > 0
    assert unformatted > 0
