# SPDX-License-Identifier: Apache-2.0
"""What the fuzzers of the wire do to bytes, and how a case ended."""

import random
from collections.abc import Iterator
from typing import Final, NamedTuple

__all__ = ["Ended", "damaged", "pieces"]

PIECES_MAX: Final = 400  # of one conversation, about


class Ended(NamedTuple):
    """How a case ended.

    Attributes:
        nr_messages: options, answers to options, requests or replies that were made for it; each counts once, also if it is
            received twice, whole and in pieces.
    """

    outcome: str
    nr_messages: int


def damaged(rng: random.Random, data: bytes) -> bytes:
    """`data` with some of it changed, doubled, left out, or cut off."""
    damage = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        if not damage:
            break
        at = rng.randrange(len(damage))
        length = min(rng.choice((1, 2, 4, 8, 28)), len(damage) - at)
        match rng.randrange(5):
            case 0:
                damage[at] ^= 1 << rng.randrange(8)
            case 1:
                damage[at : at + length] = rng.randbytes(length)
            case 2:
                del damage[at : at + length]
            case 3:
                damage[at:at] = damage[at : at + length]
            case _:
                damage[at : at + length] = rng.choice((b"\0", b"\xff")) * length
    if rng.random() < 0.2:
        del damage[rng.randrange(len(damage) + 1) :]
    return bytes(damage)


def pieces(rng: random.Random, data: bytes) -> Iterator[bytes]:
    """`data`, cut up."""
    longest = rng.choice((1, 3, 30, 500, 1 << 20))
    # Each piece of a few bytes costs as much as a long one: in much data, every other one is long.
    leap = len(data) // PIECES_MAX * 2 if len(data) > PIECES_MAX * longest else 0
    at = 0
    while at < len(data):
        length = rng.randint(1, longest)
        if leap and rng.random() < 0.5:
            length = leap - rng.randrange(leap // 2)
        yield data[at : at + length]
        at += length
