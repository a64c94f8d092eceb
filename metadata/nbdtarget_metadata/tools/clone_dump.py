# SPDX-License-Identifier: Apache-2.0
"""Metadata as JSON, for people and for `restore`.

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

Always in this order, a run [first region, number of regions] a line, ascending, as long as
possible: equal metadata gives equal text, and a `diff` shows what changed. `flags` are names, or
"bit N" for one that this version does not know. After a repair that lost something there is
"nr_lost", behind "nr_hydrated": how many hydrated regions are missing, null if nobody knows. "disks",
behind that, is the record of which disks belong to the metadata, in base64; `metadata info` shows what it says.
Without it, or emptied, the disks of the next start are accepted and recorded anew.

Nothing of the layout (arenas, journal) is in it: a device of any sufficient size can take it.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterator
from typing import Any, Final

from bitarray.util import intervals

from nbdtarget_metadata.cache.superblock import ORIGIN_COMPLETE
from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.disks import RECORD_MAX, decode_disks
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, NEEDS_CHECK

__all__ = [
    "DUMP_FORMAT",
    "DUMP_VERSION",
    "FLAG_NAMES",
    "disks_from_text",
    "disks_text",
    "flag_names",
    "render",
]

DUMP_FORMAT: Final = "nbdtarget metadata dump"
DUMP_VERSION: Final = 1
FLAG_NAMES: Final = {
    CLEAN_SHUTDOWN: "clean_shutdown",
    NEEDS_CHECK: "needs_check",
    ORIGIN_COMPLETE: "origin_complete",
}
LINES_PER_PIECE: Final = 4096


def flag_names(flags: int) -> list[str]:
    """Name the bits of `flags`, lowest first."""
    bits = (1 << nr for nr in range(flags.bit_length()) if flags >> nr & 1)
    return [FLAG_NAMES.get(bit, f"bit {bit.bit_length() - 1}") for bit in bits]


def disks_text(record: bytes) -> str:
    """Return a record of disks as a dump has it."""
    return b64encode(record).decode("ascii")


def disks_from_text(text: Any) -> bytes:
    """Invert `disks_text`. Raises: ValueError: it is no such text."""
    if not isinstance(text, str):
        raise ValueError(f"expected a text, found {text!r}")
    record = b64decode(text, validate=True)
    if len(record) > RECORD_MAX or (record and not decode_disks(record)):
        raise ValueError("is no record of disks")
    return record


def render(content: CloneContent) -> Iterator[str]:
    """Yield the text in pieces: runs are many, memory is not."""
    fields: dict[str, object] = {
        "format": DUMP_FORMAT,
        "version": DUMP_VERSION,
        "kind": "clone",
        "uuid": content.uuid.hex(),
        "generation": content.generation,
        "flags": flag_names(content.flags),
        "compat": content.compat,
        "ro_compat": content.ro_compat,
        "nr_commits": content.nr_commits,
        "nr_compactions": content.nr_compactions,
        "region_size_bytes": content.region_size,
        "target_size_bytes": content.target_size,
        "nr_regions": len(content.hydrated),
        "nr_hydrated": content.hydrated.count(),
    }
    if content.nr_lost != 0:
        fields["nr_lost"] = content.nr_lost
    if content.disks:
        fields["disks"] = disks_text(content.disks)
    head = "".join(
        f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in fields.items()
    )
    yield "{\n" + head + '  "hydrated": ['
    lines: list[str] = []
    separator = "\n"
    for value, begin, end in intervals(content.hydrated):
        if not value:
            continue
        lines.append(f"    [{begin}, {end - begin}]")
        if len(lines) == LINES_PER_PIECE:
            yield separator + ",\n".join(lines)
            separator = ",\n"
            lines.clear()
    if lines:
        yield separator + ",\n".join(lines)
        separator = ",\n"
    yield ("]" if separator == "\n" else "\n  ]") + "\n}\n"
