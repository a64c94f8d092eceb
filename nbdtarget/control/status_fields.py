# SPDX-License-Identifier: Apache-2.0
"""The `fields` of a status line, for each type of target: names, types and meanings.

The targets themselves make plain dictionaries (`Target.status_fields`); a test holds the two together. The
OpenAPI document is made from these classes. Units stand at the end of a name; a field without one is a number of things,
a word or a truth value.
"""

from typing import Annotated, Final

import msgspec

from nbdtarget.control.messages import told

__all__ = ["STATUS_FIELDS", "Fields"]

Mode = Annotated[
    str,
    told(
        "`rw`; `ro`: a commit has failed, and nothing is recorded any more; `Fail`: the metadata cannot be"
        " used at all."
    ),
]
LastError = Annotated[str | None, told("The last failure of a copy or a commit.")]
MetadataBlockSize = Annotated[int, told("Size of a metadata block: 8 sectors.")]
MetadataUsed = Annotated[int, told("Metadata blocks in use.")]
MetadataTotal = Annotated[int, told("Metadata blocks there are.")]
Commits = Annotated[int, told("Commits of the metadata since the table was loaded.")]
CommitTime = Annotated[float, told("Seconds that they have taken, added up.")]
DiscardPassdown = Annotated[bool, told("Discards are passed on to the disk below.")]


class Fields(msgspec.Struct, forbid_unknown_fields=True):
    """The fields of one type of targets."""


class CloneFields(Fields):
    """The fields of a `clone`."""

    mode: Mode
    metadata_block_size_sectors: MetadataBlockSize
    metadata_blocks_used: MetadataUsed
    metadata_blocks_total: MetadataTotal
    region_size_bytes: Annotated[int, told("Size of a region.")]
    regions_total: Annotated[int, told("Regions of the disk.")]
    regions_hydrated: Annotated[int, told("Regions that have been copied.")]
    regions_hydrating: Annotated[int, told("Regions that are being copied now.")]
    hydrated_durably: Annotated[
        bool, told("All is copied, and that is recorded: the source is not needed.")
    ]
    hydration: Annotated[bool, told("The background copies.")]
    hydration_threshold: Annotated[int, told("Regions that are copied at a time.")]
    hydration_batch_size: Annotated[int, told("Regions that are copied in one go.")]
    hydration_rate_bytes_per_s: Annotated[
        int, told("Most bytes a second that the background copies; 0: no limit.")
    ]
    hydrate_on_read: Annotated[
        bool, told("Regions that clients read are copied first.")
    ]
    discard_passdown: DiscardPassdown
    then_linear: Annotated[
        bool, told("A linear target takes the place of the clone when all is copied.")
    ]
    event_after_errors: Annotated[
        int, told("Failed copies that raise one event; 0: none do.")
    ]
    errors: Annotated[int, told("Copies that have failed.")]
    last_error: LastError
    source_changed: Annotated[
        str | None,
        told(
            "How it was noticed that the source has become another image, or is damaged: nothing more is copied. Null: it has not."
        ),
    ]
    commits: Commits
    commit_time_s: CommitTime
    source_requests: Annotated[
        int | None,
        told("Requests that were sent for a remote source; null: it is none."),
    ]
    source_retries: Annotated[int | None, told("Those that had to be sent again.")]
    source_bytes: Annotated[int | None, told("Bytes that have come from it.")]
    source_away_since_s: Annotated[
        float | None,
        told("Since when it does not answer, in Unix time; null: it does."),
    ]
    source_away_s: Annotated[
        float | None, told("Seconds that it has not answered, added up.")
    ]
    regions_failed: Annotated[int, told("Regions that wait to be tried again.")]
    retry_in_s: Annotated[
        float | None, told("Seconds until the first of them is tried again.")
    ]
    source_open: Annotated[bool, told("The source is open.")]


class CacheFields(Fields):
    """The fields of a `cache`."""

    mode: Mode
    needs_check: Annotated[
        bool, told("A commit has failed; `nbdtarget metadata check` must look at it.")
    ]
    io_mode: Annotated[str, told("`writethrough`, `writeback` or `passthrough`.")]
    metadata_block_size_sectors: MetadataBlockSize
    metadata_blocks_used: MetadataUsed
    metadata_blocks_total: MetadataTotal
    block_size_bytes: Annotated[int, told("Size of a block of the cache.")]
    cache_blocks_used: Annotated[int, told("Blocks of the cache that hold something.")]
    cache_blocks_total: Annotated[int, told("Blocks of the cache.")]
    read_hits: Annotated[int, told("Reads that found their block in the cache.")]
    read_misses: Annotated[int, told("Reads that did not.")]
    write_hits: Annotated[int, told("Writes that found their block in the cache.")]
    write_misses: Annotated[int, told("Writes that did not.")]
    hit_ratio: Annotated[
        float | None, told("Hits among all accesses, 0 to 1; null before the first.")
    ]
    written_back_bytes: Annotated[
        int,
        told("Dirty data that was copied to the origin since the table was loaded."),
    ]
    demotions: Annotated[int, told("Blocks removed from the cache to make room.")]
    promotions: Annotated[int, told("Blocks copied into the cache.")]
    migrating: Annotated[int, told("Blocks that are being copied now.")]
    dirty_blocks: Annotated[int, told("Blocks that are newer than the origin.")]
    dirty_bytes: Annotated[int, told("The same in bytes.")]
    pinned_blocks: Annotated[int, told("Blocks that stay in the cache (`pin`).")]
    discarded_bytes: Annotated[int, told("The part that clients have discarded.")]
    metadata2: Annotated[bool, told("The table has the feature `metadata2`.")]
    discard_passdown: DiscardPassdown
    dirty_log: Annotated[bool, told("Blocks are recorded before they become dirty.")]
    sorted_writeback: Annotated[
        bool, told("An idle cache writes back in the order of the origin.")
    ]
    migration_threshold_sectors: Annotated[
        int, told("Most sectors that background copies have in flight.")
    ]
    migration_rate_bytes_per_s: Annotated[
        int, told("Most bytes a second that are copied; 0: no limit.")
    ]
    policy: Annotated[str, told("Name of the policy.")]
    errors: Annotated[int, told("Copies that have failed.")]
    last_error: LastError
    commits: Commits
    commit_time_s: CommitTime
    distrusts_cache_device: Annotated[
        bool,
        told(
            "The cache device has failed a flush: clean blocks are read from the origin."
        ),
    ]
    blocks_given_up: Annotated[
        int, told("Blocks that are not used any more: the origin is read instead.")
    ]


class StripedFields(Fields):
    """The fields of a `striped`."""

    nr_stripes: Annotated[int, told("Stripes.")]
    nr_failed_stripes: Annotated[int, told("Stripes on disks that have failed.")]
    nr_errors: Annotated[int, told("Requests that have failed.")]


class DelayFields(Fields):
    """The fields of a `delay`."""

    nr_reads_waiting: Annotated[int, told("Reads that are held back now.")]
    nr_writes_waiting: Annotated[int, told("Writes that are held back now.")]
    nr_flushes_waiting: Annotated[int, told("Flushes that are held back now.")]


class DustFields(Fields):
    """The fields of a `dust`."""

    fails_reads_of_bad_blocks: Annotated[bool, told("Reads of bad blocks fail.")]
    nr_bad_blocks: Annotated[int, told("Bad blocks.")]
    quiet: Annotated[bool, told("Changes of bad blocks are not logged.")]


class LogWritesFields(Fields):
    """The fields of a `log-writes`."""

    nr_logged_entries: Annotated[int, told("Entries in the log.")]
    highest_sector: Annotated[int, told("Last sector of the log that is in use.")]
    logging: Annotated[bool, told("Writes are logged; false after an error.")]


class PowercutFields(Fields):
    """The fields of a `powercut`."""

    power_is_on: Annotated[bool, told("The power is on.")]
    nr_writes_at_risk: Annotated[int, told("Writes that no flush has covered.")]
    at_risk_bytes: Annotated[int, told("The same in bytes.")]
    nr_cuts: Annotated[int, told("Power cuts so far.")]


class ScratchFields(Fields):
    """The fields of a `scratch`."""

    written_bytes: Annotated[
        int, told("The data that was written since the last reset.")
    ]
    max_bytes: Annotated[int, told("How much may be written at most.")]
    nr_resets: Annotated[int, told("Resets so far.")]


# By type of target. The types that are not here have no fields.
STATUS_FIELDS: Final[dict[str, type[Fields]]] = {
    "cache": CacheFields,
    "clone": CloneFields,
    "delay": DelayFields,
    "dust": DustFields,
    "log-writes": LogWritesFields,
    "powercut": PowercutFields,
    "scratch": ScratchFields,
    "striped": StripedFields,
}
