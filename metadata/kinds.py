# SPDX-License-Identifier: Apache-2.0
"""Which tools a metadata device takes: its superblock's tag tells.

A kind brings its own content, dump and restore; what the tools do around them is the same.
"""

from collections.abc import Callable, Iterator
from typing import Final, NamedTuple

from metadata.check import Findings, examine, mend
from metadata.content import CloneContent, read_content
from metadata.dump import render
from metadata.errors import UnknownKind
from metadata.operations import Steps
from metadata.restore import restore
from metadata.salvage import Salvaged, salvage
from metadata.superblock import read_area, tag_of

__all__ = ["CLONE", "KINDS", "Kind", "find_kind"]


class Kind(NamedTuple):
    """The functions of one kind; see the modules that they come from."""

    name: str
    examine: Callable[..., Steps[Findings]]
    mend: Callable[..., Steps[tuple[str, ...]]]
    read_content: Callable[[int], Steps[CloneContent]]
    salvage: Callable[[int], Steps[Salvaged]]
    render: Callable[[CloneContent], Iterator[str]]
    restore: Callable[..., Steps[object]]


CLONE: Final = Kind(
    name="clone",
    examine=examine,
    mend=mend,
    read_content=read_content,
    salvage=salvage,
    render=render,
    restore=restore,
)
KINDS: Final = {CLONE.name: CLONE}


def find_kind(device_size: int) -> Steps[Kind]:
    """Return the kind that an intact superblock copy names.

    Without such a copy it is a clone's tools that say what is there instead.

    Raises: UnknownKind; UnsupportedFormat; NotOurs, MetadataTooSmall: no room for superblocks.
    """
    area = yield from read_area(device_size)
    tag = tag_of(area)
    if tag is None:
        return CLONE
    if tag not in KINDS:
        raise UnknownKind(tag)
    return KINDS[tag]
