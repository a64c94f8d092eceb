# SPDX-License-Identifier: Apache-2.0
"""Checks of answers to BLOCK_STATUS against the model of the clients."""

from nbdtarget_protocol.consts import CMD_FLAG_REQ_ONE, STATE_HOLE, STATE_ZERO
from tests.sim.model import ClientModel, RunningRead, Violation

__all__ = ["check_zeroes", "clipped"]


def clipped(
    extents: list[tuple[int, int]], length: int, flags: int
) -> list[tuple[int, int]]:
    """Return the extents cut to the request. Only the last one may reach beyond it, and only without REQ_ONE.

    Raises: Violation.
    """
    total = sum(part for part, _ in extents)
    is_last_beyond = total - extents[-1][0] < length < total
    if not (0 < total <= length or (is_last_beyond and not flags & CMD_FLAG_REQ_ONE)):
        raise Violation(f"extents {extents} for {length} bytes")
    if not all(part for part, _ in extents) or (
        flags & CMD_FLAG_REQ_ONE and len(extents) != 1
    ):
        raise Violation(f"extents {extents}")
    part, state = extents[-1]
    return [*extents[:-1], (part - max(0, total - length), state)]


def check_zeroes(
    model: ClientModel,
    running: RunningRead,
    offset: int,
    extents: list[tuple[int, int]],
) -> None:
    """Hold what is said to be zeroes against a READ that was under way. Raises: Violation."""
    for part, state in extents:
        if state & ~(STATE_HOLE | STATE_ZERO) or state == STATE_HOLE:
            raise Violation(f"allocation {state} at {offset}")
        if state & STATE_ZERO:
            model.check_piece(running, offset, bytes(part))
        offset += part
