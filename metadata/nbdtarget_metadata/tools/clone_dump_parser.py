# SPDX-License-Identifier: Apache-2.0
"""Read a clone's dump back: `Fields` (dump_fields.py), and what follows from what.

The numbers that follow from others must agree with them.
"""

from collections.abc import Iterable
from typing import Any, Final

from nbdtarget_metadata.clone.content import CloneContent
from nbdtarget_metadata.clone.superblock import NR_REGIONS_MAX
from nbdtarget_metadata.log.superblock import COUNTER_MAX
from nbdtarget_metadata.tools.dump import disks_from_text
from nbdtarget_metadata.tools.dump_fields import BITS_MAX, Fields, RunReader, number
from nbdtarget_metadata.tools.sizing import nr_regions_of
from nbdtarget_metadata.units import SECTOR, region_size_fault

__all__ = ["parse_clone"]


# The fields that are numbers, and their ranges.
_NUMBERS: Final = {
    "generation": (1, COUNTER_MAX),
    "compat": (0, BITS_MAX),
    "ro_compat": (0, BITS_MAX),
    "nr_commits": (0, COUNTER_MAX),
    "nr_compactions": (0, COUNTER_MAX),
    "region_size_bytes": (1, BITS_MAX),
    "target_size_bytes": (1, BITS_MAX),
    "nr_regions": (1, NR_REGIONS_MAX),
    "nr_hydrated": (0, NR_REGIONS_MAX),
}


def parse_clone(pieces: Iterable[bytes]) -> CloneContent:
    """Return the content that a dump, in pieces of any size, describes.

    Raises: BadDump.
    """
    hydrated = RunReader(NR_REGIONS_MAX)
    fields = Fields(
        pieces,
        "clone",
        numbers=_NUMBERS,
        rows={"hydrated": hydrated.rows("[first region, number of regions]")},
        other={"nr_lost": _nr_lost, "disks": disks_from_text},
        optional=["nr_lost", "disks"],
    )
    fields.read()
    region_size = fields["region_size_bytes"]
    target_size = fields["target_size_bytes"]
    fault = region_size_fault(region_size)
    if fault:
        raise fields.bad("region_size_bytes", fault)
    if target_size % SECTOR:
        raise fields.bad(
            "target_size_bytes", f"{target_size} is not a multiple of {SECTOR}"
        )
    nr_regions = nr_regions_of(target_size, region_size)
    fields.expect("nr_regions", nr_regions)
    bits = hydrated.bits
    if len(bits) > nr_regions:
        raise fields.bad(
            "hydrated", f"region {len(bits) - 1} is behind the last of {nr_regions}"
        )
    hydrated.fill(nr_regions)
    fields.expect("nr_hydrated", bits.count())
    return CloneContent(
        uuid=fields["uuid"],
        generation=fields["generation"],
        flags=fields["flags"],
        compat=fields["compat"],
        ro_compat=fields["ro_compat"],
        nr_commits=fields["nr_commits"],
        nr_compactions=fields["nr_compactions"],
        region_size=region_size,
        target_size=target_size,
        hydrated=bits,
        nr_lost=fields.get("nr_lost", 0),
        disks=fields.get("disks", b""),
    )


def _nr_lost(value: Any) -> int | None:
    return None if value is None else number(value, 1, NR_REGIONS_MAX)
