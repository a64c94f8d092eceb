# SPDX-License-Identifier: Apache-2.0
"""Options that are a number of bytes, as people write them: 64K, 10M, 1G."""

import typer

from nbdtarget.common.units import parse_sectors, parse_size
from nbdtarget_metadata.units import block_size_fault, region_size_fault

__all__ = [
    "block_size_option",
    "maybe_size_option",
    "offset_option",
    "region_size_option",
    "size_option",
]


def size_option(option: str, text: str, *, size_min: int = 1) -> int:
    """Return the bytes that the value `text` of `option` stands for.

    Raises: BadParameter: it is no size, or a smaller one than `size_min`.
    """
    try:
        size = parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None
    if size < size_min:
        raise typer.BadParameter(f"{option}: must be more than {size_min - 1}")
    return size


def maybe_size_option(
    option: str, text: str | None, *, size_min: int = 1
) -> int | None:
    """As `size_option`; None for an option that was not given."""
    return None if text is None else size_option(option, text, size_min=size_min)


def offset_option(option: str, text: str) -> int:
    """Return the bytes of an offset, which is a number of sectors or a size with a suffix."""
    try:
        return parse_sectors(text)
    except ValueError as error:
        raise typer.BadParameter(f"{option}: {error}") from None


def region_size_option(option: str, text: str) -> int:
    """Return the bytes of a clone's region. Raises: BadParameter: a clone cannot have it."""
    size = size_option(option, text)
    if fault := region_size_fault(size):
        raise typer.BadParameter(f"{option}: {fault}")
    return size


def block_size_option(option: str, text: str) -> int:
    """Return the bytes of a cache's block. Raises: BadParameter: a cache cannot have it."""
    size = size_option(option, text)
    if fault := block_size_fault(size):
        raise typer.BadParameter(f"{option}: {fault}")
    return size
