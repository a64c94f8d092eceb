# SPDX-License-Identifier: Apache-2.0
"""BLOCK_STATUS: the names of a device's metadata contexts on the wire, and the reply.

Every export offers `base:allocation`. Further contexts of a device (`Device.contexts`)
are offered under this project's own namespace. A client selects any of them, and is answered with one
chunk for each. The chunks of one reply may describe different numbers of bytes.

    base:allocation         as proto.md defines it
    x-nbdtarget:hydration   0 hydrated (also of every device that is not a clone), 1 not hydrated, 3 being hydrated now
    x-nbdtarget:cache       0 not cached (also of every device that is not a cache), 1 cached, 3 cached and dirty

A range may be 16 TiB long, and a device takes time and memory to describe one. So it is asked for a short range first,
and then for what follows, in steps that grow while they are quick (`Pace`). Between two steps others have their turn.
The answer ends, and is about less than was asked for, as soon as one of these is met:

    EXTENTS_ANSWER_MAX   extents are described, or one, with REQ_ONE, which QEMU always sets
    ANSWER_NS_MAX        has passed
    the device           has described less than it was asked for
    the connection       is going to be handed over to another process, and waits only for requests like this one

The request ends with an error if its client has gone meanwhile, or the server stops.

A client that selected a context keeps it when the table is replaced by one that does not have
it. From then on it is told flags 0, which every context of this project uses for the normal state.
"""

from collections.abc import Sequence
from typing import Final, NamedTuple

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import EXTENTS_MAX, Device, Extent, append_extent
from nbdtarget.server.sliced_range import Pace, Slicing
from nbdtarget_protocol.consts import BASE_ALLOCATION
from nbdtarget_protocol.handshake import CONTEXTS_MAX
from nbdtarget_protocol.replies import Replies
from nbdtarget_protocol.transmission import clip_extents

__all__ = ["NAMESPACE", "Asked", "context_names", "describe"]

NAMESPACE: Final = "x-nbdtarget:"

EXTENTS_ANSWER_MAX: Final = EXTENTS_MAX
ANSWER_NS_MAX: Final = 1_000_000_000
FIRST_LOOK_BYTES: Final = 1 << 20  # of a REQ_ONE
# Each further step is longer by this factor, if the one before was quick.
LOOK_GROWTH: Final = 4
FIRST_LOOK_GROWTH: Final = 16


def context_names(device: Device) -> tuple[str, ...]:
    """Return the names on the wire of all metadata contexts that `device` has now."""
    ours = (NAMESPACE + name for name in device.contexts)
    return (BASE_ALLOCATION, *ours)[:CONTEXTS_MAX]


class Asked(NamedTuple):
    """The contexts and the range of a BLOCK_STATUS."""

    device: Device
    slicing: Slicing
    offset: int
    length: int


async def describe(
    asked: Asked,
    contexts: Sequence[tuple[int, str]],
    replies: Replies,
    cookie: int,
    *,
    req_one: bool,
) -> bytes:
    """Encode the whole reply to a BLOCK_STATUS.

    Args:
        contexts: (id, name) of those that are to answer; at least one.
    Raises: DeviceError: one of the contexts cannot be described, so none is.
    """
    chunks = []
    at = cookie, asked.offset
    for nr, (context_id, name) in enumerate(contexts, 1):
        found = await _look(asked, name, req_one=req_one)
        clipped = clip_extents(found, asked.length, req_one=req_one)
        done = nr == len(contexts)
        chunks.append(replies.block_status(*at, context_id, clipped, done=done))
    return b"".join(chunks)


async def _look(asked: Asked, name: str, *, req_one: bool) -> list[Extent]:
    """Describe the range step by step, as far as one answer goes."""
    length = asked.length
    clock, limits, turns, reason_to_stop, is_frozen = asked.slicing
    if req_one:
        pace = Pace(clock, limits, FIRST_LOOK_BYTES, growth=FIRST_LOOK_GROWTH)
    else:
        pace = Pace(clock, limits, limits.range_slice, growth=LOOK_GROWTH)
    extents_max = 1 if req_one else EXTENTS_ANSWER_MAX
    end_ns = clock.now_ns() + ANSWER_NS_MAX
    found: list[Extent] = []
    described = 0
    while True:
        step = min(pace.length, length - described)
        pace.begin()
        more = await _extents(asked.device, name, asked.offset + described, step)
        pace.end()
        for extent in more:
            append_extent(found, *extent)
        got = sum(extent.length for extent in more)
        described += got
        if (
            described >= length
            or got < step
            or len(found) > extents_max
            or clock.now_ns() > end_ns
            or is_frozen()
        ):
            return found
        await turns.wait()
        if errno := reason_to_stop():
            name, offset = asked.device.name, asked.offset
            raise DeviceError(errno, name, "extents", offset, length)


async def _extents(device: Device, name: str, offset: int, length: int) -> list[Extent]:
    if name == BASE_ALLOCATION:
        return await device.extents(offset, length)
    context = name.removeprefix(NAMESPACE)
    return await device.context_extents(context, offset, length)
