# SPDX-License-Identifier: Apache-2.0
"""The metrics of clones and caches: most are a number of their status, by its name in `control.status_fields`."""

from collections.abc import Callable
from typing import Final

from nbdtarget.common.units import SECTOR
from nbdtarget.control.figures import TargetFigures
from nbdtarget.monitor.family import COUNTER, GAUGE, Family

__all__ = ["TARGET"]

_Value = Callable[[TargetFigures], float | None]


def _field(name: str, factor: str | int = 1) -> _Value:
    """A number of the status. Args: factor: what it is multiplied by, or the field that says so."""

    def value(target: TargetFigures) -> float | None:
        number = target.fields.get(name)
        times = factor if isinstance(factor, int) else target.fields.get(factor)
        if isinstance(number, str) or isinstance(times, str):
            return None
        return None if number is None or times is None else number * times

    return value


def _or_zero(name: str) -> Callable[[TargetFigures], float]:
    """A number of the status that is null where there is nothing to count."""
    return lambda target: _field(name)(target) or 0


def _is_not_writable(target: TargetFigures) -> float | None:
    mode = target.fields.get("mode")
    return None if mode is None else mode != "rw"


def _hydrated(target: TargetFigures) -> float | None:
    """The last region may be shorter than the others."""
    size = _field("regions_hydrated", "region_size_bytes")(target)
    return None if size is None else min(size, target.length * SECTOR)


def _target(
    target: str,
    name: str,
    kind: str,
    text: str,
    value: _Value | str,
) -> Family:
    """Args: value: or the name of the number in the status."""
    read = _field(value) if isinstance(value, str) else value
    return Family(
        f"nbdtarget_{name}",
        kind,
        text,
        ("device", "start"),
        column=lambda groups: groups.targets(target).column(read),
    )


def _both(
    name: str,
    kind: str,
    text: str,
    value: _Value | str,
) -> Family:
    return _target("clone cache", name, kind, text, value)


_REGION: Final = "region_size_bytes"
_BLOCK: Final = "block_size_bytes"

TARGET: Final = (
    _target(
        "clone",
        "clone_size_bytes",
        GAUGE,
        "Size of a clone.",
        lambda it: it.length * SECTOR,
    ),
    _target(
        "clone",
        "clone_hydrated_bytes",
        GAUGE,
        "Bytes of a clone that are copied, and read from its destination.",
        _hydrated,
    ),
    _target(
        "clone",
        "clone_hydrating_bytes",
        GAUGE,
        "Bytes of a clone that are being copied.",
        _field("regions_hydrating", _REGION),
    ),
    _target(
        "clone",
        "clone_failed_bytes",
        GAUGE,
        "Bytes of a clone whose copy has failed, and will be tried again.",
        _field("regions_failed", _REGION),
    ),
    _target(
        "clone",
        "clone_hydration_errors_total",
        COUNTER,
        "Copies of a clone that have failed.",
        "errors",
    ),
    _target(
        "clone",
        "clone_hydration_enabled",
        GAUGE,
        "1: the background copies.",
        "hydration",
    ),
    _target(
        "clone",
        "clone_source_open",
        GAUGE,
        "1: the source of a clone is open.",
        "source_open",
    ),
    _target(
        "clone",
        "clone_source_changed",
        GAUGE,
        "1: the source has become another image, or is damaged, and nothing more is copied.",
        lambda it: bool(it.fields.get("source_changed")),
    ),
    _target(
        "clone",
        "clone_source_requests_total",
        COUNTER,
        "Requests that were sent for the remote source of a clone.",
        _or_zero("source_requests"),
    ),
    _target(
        "clone",
        "clone_source_retries_total",
        COUNTER,
        "Requests for the remote source of a clone that had to be sent again.",
        _or_zero("source_retries"),
    ),
    _target(
        "clone",
        "clone_source_received_bytes_total",
        COUNTER,
        "Bytes that have come from the remote source of a clone.",
        _or_zero("source_bytes"),
    ),
    _target(
        "clone",
        "clone_source_away",
        GAUGE,
        "1: the remote source of a clone does not answer, and is asked again and again.",
        lambda it: it.fields.get("source_away_since_s") is not None,
    ),
    _target(
        "clone",
        "clone_source_away_seconds_total",
        COUNTER,
        "Time that the remote source of a clone has not answered, added up.",
        _or_zero("source_away_s"),
    ),
    _target(
        "cache",
        "cache_size_bytes",
        GAUGE,
        "Size of a cache.",
        _field("cache_blocks_total", _BLOCK),
    ),
    _target(
        "cache",
        "cache_used_bytes",
        GAUGE,
        "Bytes of a cache that hold something.",
        _field("cache_blocks_used", _BLOCK),
    ),
    _target(
        "cache",
        "cache_dirty_bytes",
        GAUGE,
        "Bytes that only the cache has: the origin is older.",
        "dirty_bytes",
    ),
    _target(
        "cache",
        "cache_migrating_bytes",
        GAUGE,
        "Bytes that are being copied between cache and origin.",
        _field("migrating", _BLOCK),
    ),
    _target(
        "cache",
        "cache_read_hits_total",
        COUNTER,
        "Reads that found their block in the cache. This and the next three go on after a restart.",
        "read_hits",
    ),
    _target(
        "cache",
        "cache_read_misses_total",
        COUNTER,
        "Reads that did not.",
        "read_misses",
    ),
    _target(
        "cache",
        "cache_write_hits_total",
        COUNTER,
        "Writes that found their block in the cache.",
        "write_hits",
    ),
    _target(
        "cache",
        "cache_write_misses_total",
        COUNTER,
        "Writes that did not.",
        "write_misses",
    ),
    _target(
        "cache",
        "cache_promotions_total",
        COUNTER,
        "Blocks that were copied into the cache.",
        "promotions",
    ),
    _target(
        "cache",
        "cache_written_back_bytes_total",
        COUNTER,
        "Bytes that were copied to the origin because they were dirty.",
        "written_back_bytes",
    ),
    _target(
        "cache",
        "cache_demotions_total",
        COUNTER,
        "Blocks that were removed from the cache to make room.",
        "demotions",
    ),
    _target(
        "cache",
        "cache_copy_errors_total",
        COUNTER,
        "Copies of a cache that have failed.",
        "errors",
    ),
    _target(
        "cache",
        "cache_needs_check",
        GAUGE,
        "1: a commit has failed, and `nbdtarget metadata check` must look at the metadata.",
        "needs_check",
    ),
    _target(
        "cache",
        "cache_distrusts_cache_device",
        GAUGE,
        "1: the cache device has failed a flush, and clean blocks are read from the origin.",
        "distrusts_cache_device",
    ),
    _both(
        "metadata_read_only",
        GAUGE,
        "1: a commit has failed, and nothing is recorded any more until the table is loaded again.",
        _is_not_writable,
    ),
    _both(
        "metadata_size_bytes",
        GAUGE,
        "Size of the metadata of a clone or a cache.",
        _field("metadata_blocks_total", 4096),
    ),
    _both(
        "metadata_used_bytes",
        GAUGE,
        "Bytes of it that are in use.",
        _field("metadata_blocks_used", 4096),
    ),
    _both(
        "commits_total",
        COUNTER,
        "Commits of the metadata since the table was loaded.",
        "commits",
    ),
    _both(
        "commit_time_seconds_total",
        COUNTER,
        "Time that they have taken, added up.",
        "commit_time_s",
    ),
)
