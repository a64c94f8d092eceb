# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS: the names of a device's metadata contexts on the wire, and the reply.

Every export offers `base:allocation`. Further contexts of a device (`Device.contexts`)
are offered under this project's own namespace. A client selects any of them, and is answered with one
chunk for each. The chunks of one reply may describe different numbers of bytes.

    base:allocation         as proto.md defines it
    x-nbdtarget:hydration   0 hydrated (also of every device that is not a clone), 1 not hydrated, 3 being hydrated now
    x-nbdtarget:cache       0 not cached (also of every device that is not a cache), 1 cached, 3 cached and dirty

REQ_ONE, which QEMU always sets, asks for one extent, but a device describes the whole range that
it is asked for. So it is asked for a short range first, and for a longer one only if the short range was of one kind.

A client that selected a context keeps it when the table is replaced by one that does not have
it. From then on it is told flags 0, which every context of this project uses for the normal state.
"""

from collections.abc import Sequence
from typing import Final

from nbdtarget.devices.base import Device, Extent
from nbdtarget_protocol.consts import BASE_ALLOCATION
from nbdtarget_protocol.handshake import CONTEXTS_MAX
from nbdtarget_protocol.transmission import block_status, clip_extents

__all__ = ["NAMESPACE", "context_names", "describe"]

NAMESPACE: Final = "x-nbdtarget:"

FIRST_LOOK_BYTES: Final = (
    1 << 20
)  # of a REQ_ONE; each further one is longer by the factor
LOOK_GROWTH: Final = 16


def context_names(device: Device) -> tuple[str, ...]:
    """Return the names on the wire of all metadata contexts that `device` has now."""
    ours = (NAMESPACE + name for name in device.contexts)
    return (BASE_ALLOCATION, *ours)[:CONTEXTS_MAX]


async def describe(
    device: Device,
    contexts: Sequence[tuple[int, str]],
    cookie: int,
    offset: int,
    length: int,
    *,
    req_one: bool,
) -> bytes:
    """Encode the whole reply to a BLOCK_STATUS.

    Args:
        contexts: (id, name) of the negotiated ones; at least one.
    Raises: DeviceError: one of the contexts cannot be described, so none is.
    """
    chunks = []
    for nr, (context_id, name) in enumerate(contexts, 1):
        asked = min(length, FIRST_LOOK_BYTES) if req_one else length
        found = await _extents(device, name, offset, asked)
        while asked < length and found[0].length == asked:
            asked = min(asked * LOOK_GROWTH, length)
            found = await _extents(device, name, offset, asked)
        clipped = clip_extents(found, length, req_one=req_one)
        done = nr == len(contexts)
        chunks.append(block_status(cookie, context_id, clipped, done=done))
    return b"".join(chunks)


async def _extents(device: Device, name: str, offset: int, length: int) -> list[Extent]:
    if name == BASE_ALLOCATION:
        return await device.extents(offset, length)
    context = name.removeprefix(NAMESPACE)
    return await device.context_extents(context, offset, length)
