# SPDX-License-Identifier: Apache-2.0
"""The words of `info` and `ls` about disks below that are not well."""

import os
from collections.abc import Iterable
from datetime import datetime

from nbdtarget.control.messages import BelowLine

__all__ = ["describe_trouble", "name_trouble", "worst_state"]

_CONSEQUENCES = {
    "latched": "no FLUSH succeeds until the disk is opened again: load its table again",
    "lost": "the disk does not answer; the server tries to find it again",
}


def worst_state(below: Iterable[BelowLine]) -> str:
    """Return "lost", "latched" or "ok"."""
    states = {device.state for device in below}
    return next((state for state in ("lost", "latched") if state in states), "ok")


def describe_trouble(below: Iterable[BelowLine]) -> list[str]:
    """Return one line for each disk with which something is, or was, wrong."""
    lines = []
    for device in below:
        parts = []
        if device.state != "ok":
            since = datetime.fromtimestamp(device.since_s).isoformat(" ", "seconds")
            parts.append(
                f"{device.state} since {since} ({os.strerror(device.errno)}):"
                f" {_CONSEQUENCES.get(device.state, '')}"
            )
        if device.errors:
            counts = [f"{nr} {what}" for what, nr in sorted(device.errors.items())]
            parts.append(f"failed: {', '.join(counts)}, last {device.last_error}")
        if device.losses:
            parts.append(f"unflushed writes may have been lost {device.losses} times")
        if parts:
            lines.append(f"{device.name}: {'; '.join(parts)}")
    return lines


def name_trouble(below: Iterable[BelowLine]) -> str:
    """Return the disks that are latched or lost, for the end of a line; "" if there are none."""
    return "".join(
        f" {device.state}: {device.name}" for device in below if device.state != "ok"
    )
