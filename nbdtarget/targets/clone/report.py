# SPDX-License-Identifier: Apache-2.0
"""The status of a clone: the kernel's status line, and the same and more by name.

The line is the kernel's to the blank while nothing is set that the kernel does not know. What
is, stands where the constructor takes it: a feature among the features, a number among the core
arguments.
"""

from typing import Final

from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Device
from nbdtarget.targets.base import StatusFields
from nbdtarget.targets.clone.hydration import Hydration
from nbdtarget.targets.clone.hydrator import Hydrator
from nbdtarget.targets.clone.regions import Regions
from nbdtarget.targets.clone.table import Options
from nbdtarget.targets.mapping import METADATA_BLOCK_SECTORS

__all__ = ["status_fields", "status_line"]

_DEFAULTS: Final = Options()


def status_line(
    regions: Regions,
    hydration: Hydration,
    hydrator: Hydrator,
    *,
    discard_passdown: bool,
    then_linear: bool,
) -> str:
    """The INFO words. Not in mode FAIL."""
    metadata = regions.metadata
    is_set = {
        "no_hydration": not hydration.enabled,
        "no_discard_passdown": not discard_passdown,
        "hydrate_on_read": hydration.hydrate_on_read,
        "then_linear": then_linear,
    }
    features = [word for word, there in is_set.items() if there]
    core = [
        f"hydration_threshold {hydration.threshold}",
        f"hydration_batch_size {hydration.batch_size}",
    ]
    if hydration.rate.bytes_per_s != _DEFAULTS.hydration_rate:
        core.append(f"hydration_rate {hydration.rate.bytes_per_s}")
    if hydrator.event_after_errors != _DEFAULTS.event_after_errors:
        core.append(f"event_after_errors {hydrator.event_after_errors}")
    words = (
        str(METADATA_BLOCK_SECTORS),
        f"{metadata.used_blocks}/{metadata.total_blocks}",
        str(regions.region_size // SECTOR),
        f"{metadata.nr_hydrated}/{metadata.nr_regions}",
        str(regions.nr_hydrating),
        str(len(features)),
        *features,
        str(2 * len(core)),
        *core,
        metadata.mode.value,
    )
    return " ".join(words)


def status_fields(
    regions: Regions,
    hydration: Hydration,
    hydrator: Hydrator,
    *,
    discard_passdown: bool,
    then_linear: bool,
) -> StatusFields:
    """Return the facts of the status line by name and with units, and the errors. Works in every mode."""
    metadata = regions.metadata
    nr_failed, retry_in_s = _failed(regions, hydration, hydrator)
    return {
        "mode": metadata.mode.value,
        "metadata_block_size_sectors": METADATA_BLOCK_SECTORS,
        "metadata_blocks_used": metadata.used_blocks,
        "metadata_blocks_total": metadata.total_blocks,
        "region_size_bytes": regions.region_size,
        "regions_total": metadata.nr_regions,
        "regions_hydrated": metadata.nr_hydrated,
        "regions_hydrating": regions.nr_hydrating,
        "hydrated_durably": metadata.hydration_done,
        "hydration": hydration.enabled,
        "hydration_threshold": hydration.threshold,
        "hydration_batch_size": hydration.batch_size,
        "hydration_rate_bytes_per_s": hydration.rate.bytes_per_s,
        "hydrate_on_read": hydration.hydrate_on_read,
        "discard_passdown": discard_passdown,
        "then_linear": then_linear,
        "event_after_errors": hydrator.event_after_errors,
        "errors": hydrator.failures.nr_errors,
        "last_error": hydrator.failures.last_error or regions.committer.last_error,
        "source_changed": regions.source.changed or None,
        **_traffic(regions.source),
        "commits": regions.committer.nr_commits,
        "commit_time_s": regions.committer.commits_ns / 1e9,
        "regions_failed": nr_failed,
        "retry_in_s": retry_in_s,
    }


def _traffic(source: Device) -> StatusFields:
    """Return the requests and the time that a remote source has cost; null for another one."""
    traffic = source.traffic
    return {
        "source_requests": None if traffic is None else traffic.requests,
        "source_retries": None if traffic is None else traffic.retries,
        "source_bytes": None if traffic is None else traffic.bytes_received,
        "source_away_since_s": (traffic.away_since_s or None) if traffic else None,
        "source_away_s": None if traffic is None else traffic.away_s,
    }


def _failed(
    regions: Regions, hydration: Hydration, hydrator: Hydrator
) -> tuple[int, float | None]:
    """Regions that wait to be tried again, and in how many seconds the first is."""
    if not regions.is_writable:
        return 0, None  # nothing will be tried
    bits = regions.metadata.hydrated
    nr_failed = 0
    retry_ns: int | None = None
    for failed in hydrator.failures.ranges():
        # A region that a client has overwritten meanwhile waits for nothing.
        if nr_waiting := bits.count(0, failed.begin, failed.end):
            nr_failed += nr_waiting
            retry_ns = min(retry_ns or failed.retry_ns, failed.retry_ns)
    if retry_ns is None:
        return 0, None
    retry_ns = max(retry_ns, hydration.slow_until_ns)
    return nr_failed, max(0, retry_ns - hydrator.clock.now_ns()) / 1e9
