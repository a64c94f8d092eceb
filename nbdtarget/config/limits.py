# SPDX-License-Identifier: Apache-2.0
"""Bounds of the server as users write them: keys of `[limits]`, and `--limit NAME=VALUE`.

They are the bounds that depend on the disk and the clients; the others are the server's own matter.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import parse_size
from nbdtarget.server.limits import RELATIONS, Limits

__all__ = [
    "LIMIT_KEYS",
    "SIZE_KEYS",
    "limits_of",
    "out_of_range",
    "parse_limits",
    "with_limits",
]

_COUNT_MAX: Final = (1 << 31) - 1
_BYTES_MAX: Final = 1 << 48
_PAYLOAD_MIN: Final = 64 << 10  # clients that do not ask may send this much anyway
_OUTPUT_MIN: Final = 64 << 10
_PAYLOAD_MAX: Final = (1 << 32) - 1
_SECONDS_MAX: Final = 86400.0 * 365
# Each with its least and its most value.
_RANGES: Final[dict[str, tuple[float, float]]] = {
    "connections_max": (1, _COUNT_MAX),
    "peer_connections_max": (1, _COUNT_MAX),
    "export_connections_max": (1, _COUNT_MAX),
    "handshakes_max": (1, _COUNT_MAX),
    "backlog_max": (1, _COUNT_MAX),
    "handshake_timeout_s": (0.001, _SECONDS_MAX),
    "handshake_total_s": (0.001, _SECONDS_MAX),
    "handshake_output_max": (_OUTPUT_MIN, _BYTES_MAX),
    "stall_timeout_s": (0.001, _SECONDS_MAX),
    "stall_total_s": (0.001, _SECONDS_MAX),
    "linger_s": (0, _SECONDS_MAX),
    "requests_in_flight_max": (1, _COUNT_MAX),
    "bytes_in_flight_max": (1, _BYTES_MAX),
    "export_requests_max": (1, _COUNT_MAX),
    "export_bytes_max": (1, _BYTES_MAX),
    "requests_total_max": (1, _COUNT_MAX),
    "bytes_total_max": (1, _BYTES_MAX),
    "send_buffer_max": (_OUTPUT_MIN, _BYTES_MAX),
    "payload_max": (_PAYLOAD_MIN, _PAYLOAD_MAX),
}
LIMIT_KEYS: Final[dict[str, Any]] = {
    key: float if key.endswith("_s") else int for key in _RANGES
}
SIZE_KEYS: Final = (
    "handshake_output_max",
    "send_buffer_max",
    "bytes_in_flight_max",
    "export_bytes_max",
    "bytes_total_max",
    "payload_max",
)


def out_of_range(key: str, value: float) -> str:
    """Why a bound cannot have this value; "": it can."""
    least, most = _RANGES[key]
    return "" if least <= value <= most else f"must be {least:.12g} to {most:.16g}"


def limits_of(
    values: Mapping[str, Any], base: Limits | None = None
) -> tuple[Limits, str, str]:
    """Return `base` with these values, "" and ""; or the defaults, the key that contradicts another bound, and the reason."""
    base = base or Limits()
    for smaller, larger in RELATIONS:
        low = values.get(smaller, getattr(base, smaller))
        high = values.get(larger, getattr(base, larger))
        if low > high:
            key = smaller if smaller in values else larger
            return Limits(), key, f"{smaller} {low} is more than {larger} {high}"
    return replace(base, **values), "", ""


def with_limits(base: Limits, values: Mapping[str, Any]) -> Limits:
    """Return `base` with these values, each of which is in its range. Raises: NbdTargetError: two bounds contradict each other."""
    limits, _, reason = limits_of(values, base)
    if reason:
        raise NbdTargetError(f"limits: {reason}")
    return limits


def parse_limits(words: Sequence[str]) -> dict[str, Any]:
    """Return bounds by name: each word is `NAME=VALUE`, with suffixes as in 64M for sizes. Raises: NbdTargetError."""
    found: dict[str, Any] = {}
    for word in words:
        key, equals, text = word.partition("=")
        if not equals:
            raise NbdTargetError(
                f"limit {word}: write NAME=VALUE, for example connections_max=64"
            )
        if key not in _RANGES:
            near = difflib.get_close_matches(key, _RANGES, 1)
            hint = (
                f"did you mean {near[0]}?"
                if near
                else f"there are {', '.join(_RANGES)}"
            )
            raise NbdTargetError(f"limit {key}: no bound is called so ({hint})")
        if key in found:
            raise NbdTargetError(f"limit {key}: is given twice")
        try:
            value = parse_size(text) if key in SIZE_KEYS else LIMIT_KEYS[key](text)
        except ValueError:
            raise NbdTargetError(f"limit {key}: {text!r} is no number") from None
        if reason := out_of_range(key, value):
            raise NbdTargetError(f"limit {key}: {reason}")
        found[key] = value
    return found
