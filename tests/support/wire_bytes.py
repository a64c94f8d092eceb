# SPDX-License-Identifier: Apache-2.0
"""`BytesRandom`: random numbers that a fuzzer chooses, byte by byte; and the corpus of such bytes that is kept.

A coverage-guided fuzzer changes bytes and looks which code runs then. So that it changes conversations, and not only their
damage, the fuzzers of `wire_fuzz.py` draw their numbers from its bytes: each choice takes as few of them as it needs. When the bytes are
used up, all further numbers are 0, which is the first of each choice.

The corpus has one file for each fuzzer, `wire_corpus/NAME.txt`: one case a line, in hexadecimal. The gate replays them
all. `scripts/fuzz_wire_guided.py` adds to it.
"""

import random
from pathlib import Path
from typing import Final

__all__ = ["CORPUS", "BytesRandom", "corpus_path", "read_corpus", "write_corpus"]

CORPUS: Final = Path(__file__).with_name("wire_corpus")
LONG: Final = 16  # bytes; longer ones are made from 4


class BytesRandom(random.Random):
    """See the module head."""

    def __init__(self, data: bytes) -> None:
        super().__init__(0)
        self._data = data
        self._at = 0

    def getrandbits(self, k: int, /) -> int:
        length = (k + 7) // 8
        taken = self._data[self._at : self._at + length]
        self._at += length
        return int.from_bytes(taken, "little") & ((1 << k) - 1)

    def random(self) -> float:
        return self.getrandbits(8) / 256

    def randbytes(self, n: int) -> bytes:
        if n <= LONG:
            return super().randbytes(n)
        return random.Random(self.getrandbits(32)).randbytes(n)


def corpus_path(fuzzer: str) -> Path:
    """Where the corpus of a fuzzer lies."""
    return CORPUS / f"{fuzzer.replace(', ', '-').replace(' ', '-')}.txt"


def read_corpus(fuzzer: str) -> list[bytes]:
    """Return the cases that are kept for a fuzzer; none if there is no file yet."""
    path = corpus_path(fuzzer)
    if not path.exists():
        return []
    return [bytes.fromhex(line) for line in path.read_text().splitlines()]


def write_corpus(fuzzer: str, cases: list[bytes]) -> None:
    """Keep these cases, and no others; in an order that depends on nothing but them."""
    CORPUS.mkdir(exist_ok=True)
    lines = sorted((case.hex() for case in cases), key=lambda line: (len(line), line))
    corpus_path(fuzzer).write_text("".join(f"{line}\n" for line in lines))
