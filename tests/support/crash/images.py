# SPDX-License-Identifier: Apache-2.0
"""Images of metadata devices, looked into and made without a device."""

from typing import TypeVar

from bitarray import bitarray

from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import NotFormatted
from nbdtarget_metadata.operations import Answer, Flush, Operation, Read, Steps, Write

__all__ = ["committed_bits", "run_over", "worn_metadata"]

T = TypeVar("T")


def committed_bits(image: bytes, region_size: int, target_size: int) -> bitarray | None:
    """Return the bits that the metadata on `image` vouches for; None: it is not formatted."""
    opening = CloneMetadata.open(
        device_size=len(image), region_size=region_size, target_size=target_size
    )
    try:
        return run_over(bytearray(image), opening).hydrated
    except NotFormatted:
        return None


def worn_metadata(region_size: int, target_size: int, nr_commits: int) -> bytes:
    """Metadata whose journal has seen `nr_commits`: of one region each, from the last one on."""
    nr_regions = -(-target_size // region_size)
    image = bytearray(CloneMetadata.device_size_min(nr_regions))
    metadata = run_over(
        image,
        CloneMetadata.format(
            device_size=len(image),
            region_size=region_size,
            target_size=target_size,
            uuid=b"worn" * 4,
        ),
    )
    for region_nr in range(nr_regions - nr_commits, nr_regions):
        metadata.set_hydrated(region_nr, region_nr + 1)
        transaction = metadata.pre_commit()
        assert transaction is not None
        run_over(image, transaction.journal())
        run_over(image, transaction.superblock())
        transaction.done()
    return bytes(image)


def run_over(image: bytearray, steps: Steps[T]) -> T:
    """Run steps over what a disk holds."""
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            step = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if isinstance(step, Read | Write | Flush):
            answer = _carry_out(image, step)
        else:
            answer = tuple(_carry_out(image, each) for each in step)


def _carry_out(image: bytearray, operation: Operation) -> Answer:
    if isinstance(operation, Read):
        return bytes(image[operation.offset : operation.offset + operation.length])
    if isinstance(operation, Write):
        end = operation.offset + len(operation.data)
        image[operation.offset : end] = operation.data
    return None
