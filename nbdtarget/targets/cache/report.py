# SPDX-License-Identifier: Apache-2.0
"""The status of a cache: the kernel's status line, and the same and more by name.

The line is the kernel's to the blank, the last one included, while nothing is set that the kernel
does not know. What is, stands where the constructor takes it: a feature among the features, a
number among the core arguments.

Used blocks are those that the policy knows of, with those that promotions are on the way to. A
table that was never resumed, or was refused, knows of no blocks, hence of no dirty ones.
"""

from collections.abc import Iterable

from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.targets.base import StatusFields
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.table import PASSTHROUGH, WRITEBACK, WRITETHROUGH
from nbdtarget.targets.mapping import METADATA_BLOCK_SECTORS
from nbdtarget.targets.measured import yes_or_no

__all__ = ["measured_pairs", "status_fields", "status_line"]


def status_line(blocks: Blocks, *, discard_passdown: bool) -> str:
    """The INFO words. Not in mode FAIL.

    Args:
        discard_passdown: whether discards go on to the origin, which may not take any.
    """
    metadata, options, policy = blocks.metadata, blocks.options, blocks.policy
    statistics = metadata.statistics
    is_set = {
        "metadata2": options.metadata2,
        options.mode: True,
        "no_discard_passdown": not discard_passdown,
        "dirty_log": options.dirty_log,
        "sorted_writeback": options.sorted_writeback,
    }
    features = [word for word, there in is_set.items() if there]
    core = [f"migration_threshold {options.migration_threshold}"]
    if options.migration_rate:
        core.append(f"migration_rate {options.migration_rate}")
    pairs = policy.config_values()
    words = (
        str(METADATA_BLOCK_SECTORS),
        f"{metadata.used_blocks}/{metadata.total_blocks}",
        str(blocks.block_size // SECTOR),
        f"{policy.residency}/{metadata.nr_cblocks}",
        str(statistics.read_hits),
        str(statistics.read_misses),
        str(statistics.write_hits),
        str(statistics.write_misses),
        str(blocks.nr_demotions),
        str(blocks.nr_promotions),
        str(_nr_dirty(blocks)),
        str(len(features)),
        *features,
        str(2 * len(core)),
        *core,
        policy.name,
        str(2 * len(pairs)),
        *(f"{key} {value}" for key, value in pairs),
        metadata.mode.value,
        "needs_check" if metadata.needs_check else "-",
        "",  # the kernel's line ends with a blank
    )
    return " ".join(words)


def status_fields(blocks: Blocks, *, discard_passdown: bool) -> StatusFields:
    """Return the facts of the status line by name and with units, and those without a place in it. Works in every mode."""
    metadata, options, policy = blocks.metadata, blocks.options, blocks.policy
    statistics = metadata.statistics
    nr_hits = statistics.read_hits + statistics.write_hits
    nr_accesses = nr_hits + statistics.read_misses + statistics.write_misses
    nr_dirty = _nr_dirty(blocks)
    return {
        "mode": metadata.mode.value,
        "needs_check": metadata.needs_check,
        "io_mode": options.mode,
        "metadata_block_size_sectors": METADATA_BLOCK_SECTORS,
        "metadata_blocks_used": metadata.used_blocks,
        "metadata_blocks_total": metadata.total_blocks,
        "block_size_bytes": blocks.block_size,
        "cache_blocks_used": policy.residency,
        "cache_blocks_total": metadata.nr_cblocks,
        "read_hits": statistics.read_hits,
        "read_misses": statistics.read_misses,
        "write_hits": statistics.write_hits,
        "write_misses": statistics.write_misses,
        "hit_ratio": nr_hits / nr_accesses if nr_accesses else None,
        "demotions": blocks.nr_demotions,
        "promotions": blocks.nr_promotions,
        "written_back_bytes": blocks.nr_written_back * blocks.block_size,
        "migrating": blocks.nr_migrating,
        "dirty_blocks": nr_dirty,
        "dirty_bytes": nr_dirty * blocks.block_size,
        "pinned_blocks": policy.nr_pinned,
        "discarded_bytes": blocks.discards.nr_discarded * blocks.discards.dblock_size,
        "metadata2": options.metadata2,
        "discard_passdown": discard_passdown,
        "dirty_log": options.dirty_log,
        "sorted_writeback": options.sorted_writeback,
        "migration_threshold_sectors": options.migration_threshold,
        "migration_rate_bytes_per_s": options.migration_rate,
        "policy": policy.name,
    }


def measured_pairs(
    blocks: Blocks, devices: Iterable[Device], *, discard_passdown: bool
) -> list[tuple[str, str]]:
    """Return the pairs that `measure` prints, with the kernel's names.

    Args: devices: metadata, cache, origin.
    """
    options = blocks.options
    roles = ("cache_metadata_device", "cache_device", "cache_origin_device")
    modes = (WRITETHROUGH, WRITEBACK, PASSTHROUGH)
    return [
        ("metadata_mode", blocks.metadata.mode.value.lower()),
        *((role, each.name) for role, each in zip(roles, devices, strict=True)),
        *((mode, yes_or_no(options.mode == mode)) for mode in modes),
        ("metadata2", yes_or_no(options.metadata2)),
        ("no_discard_passdown", yes_or_no(not discard_passdown)),
    ]


def _nr_dirty(blocks: Blocks) -> int:
    return blocks.metadata.nr_dirty if blocks.policy.residency else 0
