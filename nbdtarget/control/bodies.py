# SPDX-License-Identifier: Apache-2.0
"""Bodies of requests and answers: how large they may be, and how a long one is encoded.

The decoder and the encoder of JSON do their work in one call, in which nothing else runs; a thread does not help, because
the call holds the interpreter's lock. So what one call may have to do is bounded:

    request     A table has TARGETS_MAX = 65,536 lines at most, so a body of 4 MiB has room for 64 bytes a line. Decoding it
                takes 2 ms. The bodies of all other verbs are short: a name, some options, the words of a message.
                256 KiB of them, made of as many words as possible, take 3 ms.
    answer      A status of 65,536 lines takes 20 to 40 ms. It is encoded in pieces of LINES_AT_ONCE lines, and between two
                pieces the loop serves everything else.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

import msgspec

from nbdtarget.common.clock import sleep
from nbdtarget.control import messages as m

__all__ = [
    "BODY_BYTES_MAX",
    "LINES_AT_ONCE",
    "OTHER_BODY_BYTES_MAX",
    "body_bytes_max",
    "encode",
]

BODY_BYTES_MAX: Final = 4 << 20  # of a verb that takes a table
OTHER_BODY_BYTES_MAX: Final = 256 << 10
LINES_AT_ONCE: Final = 256

_TABLE_VERBS: Final = frozenset({"create", "load"})


def body_bytes_max(verb: str) -> int:
    """Return how large the body of a request may be."""
    return BODY_BYTES_MAX if verb in _TABLE_VERBS else OTHER_BODY_BYTES_MAX


async def encode(answer: m.Answer) -> bytes:
    """Encode an answer; a long one in pieces, between which the loop has its turns."""
    if isinstance(answer, m.LinesAnswer):
        shorter = [await _with_short_lines(device) for device in answer.devices]
        groups = list(_groups([1 + len(each.lines) for each in answer.devices]))
        return await _encode_devices(answer, shorter, groups)
    if isinstance(answer, (m.InfoAnswer, m.DevicesAnswer)):
        groups = list(_groups([1] * len(answer.devices)))
        return await _encode_devices(answer, answer.devices, groups)
    return msgspec.json.encode(answer)


def _groups(weights: Sequence[int]) -> Iterator[slice]:
    """Cut a sequence into consecutive parts that weigh LINES_AT_ONCE or a little more."""
    begin = weight = 0
    for nr, each in enumerate(weights, 1):
        weight += each
        if weight >= LINES_AT_ONCE or nr == len(weights):
            yield slice(begin, nr)
            begin, weight = nr, 0


async def _encode_devices(
    answer: m.Answer, devices: Sequence[m.Answer], groups: Sequence[slice]
) -> bytes:
    if len(groups) <= 1:
        return msgspec.json.encode(msgspec.structs.replace(answer, devices=devices))
    encoded = await _encode_list(devices, groups)
    return msgspec.json.encode(msgspec.structs.replace(answer, devices=encoded))


async def _with_short_lines(device: m.DeviceLines) -> m.DeviceLines:
    """The same device, with its lines already encoded if they are many."""
    if len(device.lines) <= LINES_AT_ONCE:
        return device
    groups = list(_groups([1] * len(device.lines)))
    lines: Any = await _encode_list(device.lines, groups)
    return msgspec.structs.replace(device, lines=lines)


async def _encode_list(
    items: Sequence[m.Answer], groups: Sequence[slice]
) -> msgspec.Raw:
    """Encode a list group by group. The encoder copies a `Raw` as it is."""
    pieces = []
    for group in groups:
        pieces.append(msgspec.json.encode(items[group])[1:-1])
        await sleep(0)
    return msgspec.Raw(b"[" + b",".join(pieces) + b"]")
