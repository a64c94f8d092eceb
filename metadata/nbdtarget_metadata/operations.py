# SPDX-License-Identifier: Apache-2.0
"""The operations that the code of this package asks of its caller, which does the I/O.

Every function here that needs I/O is a generator: it yields an operation (or a tuple of
operations that may be carried out at the same time) and is sent the answer (or a tuple of
answers). It does no I/O, waits for nothing and keeps no time itself, so the same code runs
over an asynchronous device, over a plain file in an offline tool, and over a simulated disk
whose power is cut between any two operations.

    Read(offset, length)        answered with `length` bytes
    TryRead(offset, length)     the same; if the disk cannot read them, with `UNREADABLE` for each block
    Write(offset, data, fua)    answered with None, once it has ended
    Flush()                     answered with None, once it has ended
    ()                          nothing to do: let others run (a step may take milliseconds)

The contract is a disk's: an ended Write survives a power cut only if it carried FUA or a Flush
that was submitted later has ended; until then each of its 512-byte sectors, on its own, may be
old or new. An operation that fails is not answered: the generator is closed, and the owner
calls `abort` or `fail` on what was being changed. An operation, once given, must have
ended before the generator is closed: a late Write would land on what is written next.
"""

from collections.abc import Generator
from typing import Final, NamedTuple, TypeAlias, TypeVar

__all__ = [
    "UNREADABLE",
    "Answer",
    "Flush",
    "Operation",
    "Read",
    "Steps",
    "TryRead",
    "Write",
    "read",
    "without_flushes",
]

T = TypeVar("T")

# Stands for a block that a disk cannot read: neither zeroes nor anything of ours.
UNREADABLE: Final = b"\xee" * 4096


class Read(NamedTuple):
    """Read `length` bytes from `offset`."""

    offset: int
    length: int


class TryRead(Read):
    """As `Read`, of blocks without which the reader can go on: see the module head."""

    __slots__ = ()


class Write(NamedTuple):
    """Write `data` at `offset`; with `fua`, to stable storage before it ends."""

    offset: int
    data: bytes | bytearray | memoryview
    fua: bool = False


class Flush(NamedTuple):
    """Make every Write that has ended survive a power cut.

    An empty tuple compares equal to it: tell them apart by `isinstance`, operations first.
    """


Operation: TypeAlias = Read | Write | Flush
Answer: TypeAlias = bytes | bytearray | memoryview | None
Steps: TypeAlias = Generator[
    Operation | tuple[Operation, ...], Answer | tuple[Answer, ...], T
]


def read(offset: int, length: int, how: type[Read] = Read) -> Steps[memoryview]:
    """Read `length` bytes from `offset`, as `how` says."""
    answer = yield how(offset, length)
    assert answer is not None
    assert not isinstance(answer, tuple)
    assert len(answer) == length, "a Read is answered in full"
    return memoryview(answer)


def without_flushes(steps: Steps[T]) -> Steps[T]:
    """Run `steps` without its flushes: for a caller that only reads, and promises nothing."""
    answer: Answer | tuple[Answer, ...] = None
    try:
        while True:
            try:
                operation = steps.send(answer)
            except StopIteration as stop:
                result: T = stop.value
                return result
            answer = None if isinstance(operation, Flush) else (yield operation)
    finally:
        steps.close()
