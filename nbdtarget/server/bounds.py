# SPDX-License-Identifier: Apache-2.0
"""`BOUNDS`: what clients may ask of a server, by name; and `BoundsMet`: how often each bound was met.

Each name is a field of `Limits`, so it has a default; it is a key in the section `limits` of the configuration file, it has an entry in
`docs/reference/configuration.md`, and metrics tell its value and how often it was met (`nbdtarget_limit`,
`nbdtarget_limit_met_total`). A test walks through all of them. The other fields of `Limits` say how the server works, and refuse no client (`INNER`).

A bound is *met* when a connection is refused or ended because of it, when it begins to wait, or when one of its requests is refused.
"""

from typing import Final

__all__ = ["BOUNDS", "INNER", "UNCOUNTED", "BoundsMet"]

BOUNDS: Final = (
    "connections_max",
    "peer_connections_max",
    "export_connections_max",
    "handshakes_max",
    "backlog_max",
    "handshake_timeout_s",
    "handshake_total_s",
    "handshake_output_max",
    "stall_timeout_s",
    "stall_total_s",
    "linger_s",
    "requests_in_flight_max",
    "bytes_in_flight_max",
    "export_requests_max",
    "export_bytes_max",
    "requests_total_max",
    "bytes_total_max",
    "send_buffer_max",
    "payload_max",
)

# The kernel enforces this bound, and does not tell which server it was.
UNCOUNTED: Final = ("backlog_max",)

INNER: Final = (
    "guaranteed_bytes",
    "send_queue_max",
    "turn_us",
    "turn_bytes_max",
    "read_slice",
    "range_slice",
    "payload_step",
    "progress_bytes",
    "receive_buffer",
    "arena",
    "arena_read_max",
    "own_payload_min",
    "pool_bytes_max",
    "socket_buffer",
    "zero_check_min",
    "flush_at",
    "poll_us",
    "poison_borrowed",
)


class BoundsMet:
    """How often the clients of one listener have met each bound.

    Attributes: counts: by name; all of them are there from the beginning.
    """

    __slots__ = ("counts",)

    def __init__(self) -> None:
        self.counts = dict.fromkeys(
            (name for name in BOUNDS if name not in UNCOUNTED), 0
        )

    def met(self, name: str) -> None:
        """Count that the bound `name` was met once more."""
        self.counts[name] += 1
