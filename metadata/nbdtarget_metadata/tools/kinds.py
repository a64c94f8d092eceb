# SPDX-License-Identifier: Apache-2.0
"""The tools of each kind, and which kind a metadata device or a dump belongs to.

A kind has its own content, checks, dump and restore. What the tools do around them is the same.
"""

import re
from collections.abc import Callable, Iterable, Iterator
from itertools import chain
from typing import Any, Final, NamedTuple, TypeAlias

from nbdtarget_metadata.cache.content import CacheContent, read_cache_content
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import CACHE as CACHE_SUPERBLOCK
from nbdtarget_metadata.clone.content import CloneContent, read_clone_content
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.clone.superblock import CLONE as CLONE_SUPERBLOCK
from nbdtarget_metadata.errors import UnknownKind
from nbdtarget_metadata.log.superblock import SuperblockType, read_area, tag_of
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.cache_dump import render_cache
from nbdtarget_metadata.tools.cache_dump_parser import parse_cache
from nbdtarget_metadata.tools.cache_restore import restore_cache
from nbdtarget_metadata.tools.cache_salvage import salvage_cache
from nbdtarget_metadata.tools.check import KindChecks
from nbdtarget_metadata.tools.clone_check import CLONE_CHECKS
from nbdtarget_metadata.tools.clone_dump import render_clone
from nbdtarget_metadata.tools.clone_dump_parser import parse_clone
from nbdtarget_metadata.tools.clone_restore import restore_clone
from nbdtarget_metadata.tools.clone_salvage import salvage_clone
from nbdtarget_metadata.tools.salvage import Salvaged

__all__ = ["CACHE", "CLONE", "KINDS", "Content", "Kind", "find_kind", "parse_dump"]

# Where the kind of a dump is looked for: it stands before the long lists.
HEAD_SIZE: Final = 1 << 16
_KIND: Final = re.compile(rb'"kind"[ \t\r\n]*:[ \t\r\n]*"cache"')

Content: TypeAlias = CloneContent | CacheContent


class Kind(NamedTuple):
    """The functions of one kind; see the modules that they come from.

    `render` and `restore` take the content that `read_content` and `salvage` of the same kind return.
    """

    name: str
    superblock: SuperblockType[Any]
    checks: KindChecks[Any]
    read_content: Callable[[int], Steps[Content]]
    salvage: Callable[[int], Steps[Salvaged[Any]]]
    render: Callable[[Any], Iterator[str]]
    restore: Callable[..., Steps[object]]
    preferred_size: Callable[[Any], int]


def _clone_size(content: CloneContent) -> int:
    return CloneMetadata.device_size_for(len(content.hydrated))


def _cache_size(content: CacheContent) -> int:
    return CacheMetadata.device_size_for(content.nr_cblocks)


CLONE: Final = Kind(
    name="clone",
    superblock=CLONE_SUPERBLOCK,
    checks=CLONE_CHECKS,
    read_content=read_clone_content,
    salvage=salvage_clone,
    render=render_clone,
    restore=restore_clone,
    preferred_size=_clone_size,
)
CACHE: Final = Kind(
    name="cache",
    superblock=CACHE_SUPERBLOCK,
    checks=CACHE_CHECKS,
    read_content=read_cache_content,
    salvage=salvage_cache,
    render=render_cache,
    restore=restore_cache,
    preferred_size=_cache_size,
)
KINDS: Final = {kind.name: kind for kind in (CLONE, CACHE)}


def find_kind(device_size: int) -> Steps[Kind]:
    """Return the kind that an intact superblock copy names.

    Without such a copy it returns CLONE, whose tools then report what is there instead.

    Raises: UnknownKind; UnsupportedFormat; NotOurs, MetadataTooSmall: no room for superblocks.
    """
    area = yield from read_area(device_size)
    tag = tag_of(area)
    if tag is None:
        return CLONE
    if tag not in KINDS:
        raise UnknownKind(tag)
    return KINDS[tag]


def parse_dump(pieces: Iterable[bytes]) -> tuple[Kind, Content]:
    """Return the content that a dump in JSON describes, and its kind.

    Without a known kind the parser of a clone reads it, and reports what is there instead.

    Raises: BadDump.
    """
    rest = iter(pieces)
    head = b""
    while len(head) < HEAD_SIZE and (piece := next(rest, b"")):
        head += piece
    if _KIND.search(head):
        return CACHE, parse_cache(chain([head], rest))
    return CLONE, parse_clone(chain([head], rest))
