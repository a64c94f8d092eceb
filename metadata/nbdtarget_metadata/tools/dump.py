# SPDX-License-Identifier: Apache-2.0
"""Shared by the dumps of all kinds: the fields at their head, and how a list is written.

The fields stand always in this order, and equal metadata gives equal text, so that a `diff` of two
dumps shows what changed. `flags` are names, or "bit N" for one that this version does not know.
After a repair that lost something there is "nr_lost": how many regions or blocks are missing, or
null if that is not known. "disks" is the record of which disks belong to the metadata, in base64;
`metadata info` shows what it says. Without it, or emptied, the disks of the next start are accepted
and recorded anew.

Nothing of the layout (arenas, journal) is in a dump: a device of any sufficient size can take it.
"""

import json
from base64 import b64decode, b64encode
from collections.abc import Iterable, Iterator
from typing import Any, Final

from nbdtarget_metadata.cache.content import CacheContent
from nbdtarget_metadata.cache.superblock import ORIGIN_COMPLETE
from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.disks import RECORD_MAX, decode_disks
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN, NEEDS_CHECK

__all__ = [
    "DUMP_FORMAT",
    "DUMP_VERSION",
    "FLAG_NAMES",
    "common_fields",
    "disks_from_text",
    "flag_names",
    "loss_fields",
    "render_fields",
    "render_rows",
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


def common_fields(kind: str, content: CloneContent | CacheContent) -> dict[str, object]:
    """Return the first fields of a dump, in their order."""
    return {
        "format": DUMP_FORMAT,
        "version": DUMP_VERSION,
        "kind": kind,
        "uuid": content.uuid.hex(),
        "generation": content.generation,
        "flags": flag_names(content.flags),
        "compat": content.compat,
        "ro_compat": content.ro_compat,
        "nr_commits": content.nr_commits,
        "nr_compactions": content.nr_compactions,
    }


def loss_fields(content: CloneContent | CacheContent) -> dict[str, object]:
    """Return the fields that are there only if there is something to say."""
    fields: dict[str, object] = {}
    if content.nr_lost != 0:
        fields["nr_lost"] = content.nr_lost
    if content.disks:
        fields["disks"] = disks_text(content.disks)
    return fields


def render_fields(fields: dict[str, object]) -> str:
    """Return the text of the dump from its beginning; lists of rows follow."""
    lines = (
        f"  {json.dumps(key)}: {json.dumps(value)},\n" for key, value in fields.items()
    )
    return "{\n" + "".join(lines)


def render_rows(key: str, rows: Iterable[str]) -> Iterator[str]:
    """Yield a field that is a list, in pieces, without what follows it: rows are many."""
    yield f'  "{key}": ['
    lines: list[str] = []
    separator = "\n"
    for row in rows:
        lines.append("    " + row)
        if len(lines) == LINES_PER_PIECE:
            yield separator + ",\n".join(lines)
            separator = ",\n"
            lines.clear()
    if lines:
        yield separator + ",\n".join(lines)
        separator = ",\n"
    yield "]" if separator == "\n" else "\n  ]"
