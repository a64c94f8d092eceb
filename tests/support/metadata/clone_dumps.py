# SPDX-License-Identifier: Apache-2.0
"""Contents of a clone's metadata as values, and as the text of a dump."""

from typing import Any

from bitarray import bitarray

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.tools.clone_dump import render_clone

__all__ = ["make_content", "text_of"]


def make_content(hydrated: bitarray, **fields: Any) -> CloneContent:
    content = CloneContent(
        uuid=bytes(range(16)),
        generation=7,
        flags=CLEAN_SHUTDOWN,
        compat=0,
        ro_compat=0,
        nr_commits=6,
        nr_compactions=1,
        region_size=4096,
        target_size=4096 * len(hydrated) - 512,
        hydrated=hydrated,
    )
    return content._replace(**fields)


def text_of(content: CloneContent) -> str:
    return "".join(render_clone(content))
