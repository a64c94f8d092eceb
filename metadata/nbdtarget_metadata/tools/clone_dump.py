# SPDX-License-Identifier: Apache-2.0
"""A clone's metadata as JSON, for people and for `restore`. What all dumps share: see dump.py.

    {
      "format": "nbdtarget metadata dump",
      "version": 1,
      "kind": "clone",
      "uuid": "000102030405060708090a0b0c0d0e0f",
      "generation": 5,
      "flags": ["clean_shutdown"],
      "compat": 0,
      "ro_compat": 0,
      "nr_commits": 4,
      "nr_compactions": 1,
      "region_size_bytes": 4096,
      "target_size_bytes": 286719488,
      "nr_regions": 70000,
      "nr_hydrated": 4003,
      "hydrated": [
        [1000, 2000],
        [5000, 1]
      ]
    }

A run [first region, number of regions] a line, ascending, as long as possible. "nr_lost" and
"disks", if they are there, stand behind "nr_hydrated".
"""

from collections.abc import Iterator

from bitarray.util import intervals

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.tools.dump import (
    common_fields,
    loss_fields,
    render_fields,
    render_rows,
)

__all__ = ["render_clone"]


def render_clone(content: CloneContent) -> Iterator[str]:
    """Yield the text in pieces."""
    fields = common_fields("clone", content)
    fields["region_size_bytes"] = content.region_size
    fields["target_size_bytes"] = content.target_size
    fields["nr_regions"] = len(content.hydrated)
    fields["nr_hydrated"] = content.hydrated.count()
    fields |= loss_fields(content)
    yield render_fields(fields)
    runs = intervals(content.hydrated)
    rows = (f"[{begin}, {end - begin}]" for value, begin, end in runs if value)
    yield from render_rows("hydrated", rows)
    yield "\n}\n"
