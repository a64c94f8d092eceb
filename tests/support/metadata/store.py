# SPDX-License-Identifier: Apache-2.0
"""A metadata device in memory whose power can be cut between any two events.

Operations are **submitted** and, some time later, **end**; several may be under way. A Write
that has ended is visible, and durable only by FUA or a Flush submitted after its end. A crash
keeps, drops or tears (at 512-byte sectors) each write that is not durable, each on its own.
"""

import random
from collections.abc import Iterator
from itertools import product
from typing import TypeVar

from nbdtarget_metadata.operations import Answer, Flush, Operation, Read, Steps, Write

T = TypeVar("T")

SECTOR = 512
SUBSETS_MAX = 5  # so many pending writes are tried in every combination
RANDOM_IMAGES = 6


class Ticket:
    """One operation under way."""

    def __init__(self, operation: Operation, covered: list["Ticket"]) -> None:
        self.operation = operation
        self.covered = covered  # a Flush: the writes that it makes durable


class Store:
    """See the module head. `durable` is what no crash can take away."""

    def __init__(self, size: int, content: bytes = b"") -> None:
        self.size = size
        self.durable = bytearray(content or bytes(size))
        self.pending: list[Ticket] = []  # ended, not durable; in order of their ends
        self.under_way: list[Ticket] = []  # writes only
        self.flush_counts = True  # mutants: a flush that does nothing
        self.fua_counts = True
        self.log: list[Operation] = []

    def submit(self, operation: Operation) -> Ticket:
        self.log.append(operation)
        ticket = Ticket(operation, list(self.pending))
        if isinstance(operation, Write):
            assert operation.offset + len(operation.data) <= self.size
            self.under_way.append(ticket)
        return ticket

    def end(self, ticket: Ticket) -> Answer:
        operation = ticket.operation
        if isinstance(operation, Read):
            view = self.current()
            return view[operation.offset : operation.offset + operation.length]
        if isinstance(operation, Flush):
            if self.flush_counts:
                for write in ticket.covered:
                    if write in self.pending:
                        self.pending.remove(write)
                        _apply(self.durable, write)
            return None
        self.under_way.remove(ticket)
        if operation.fua and self.fua_counts:
            _apply(self.durable, ticket)
        else:
            self.pending.append(ticket)
        return None

    def do(self, operation: Operation) -> Answer:
        return self.end(self.submit(operation))

    def current(self) -> bytearray:
        """Return the bytes that are read now, and after the process is killed."""
        image = bytearray(self.durable)
        for ticket in self.pending:
            _apply(image, ticket)
        return image

    def kill(self, rng: random.Random) -> None:
        """End the process: what is under way may still land, then everything is as it is."""
        for ticket in list(self.under_way):
            self.under_way.remove(ticket)
            if rng.random() < 0.5:
                self.pending.append(ticket)

    def state(self) -> tuple[int, ...]:
        """Identify what a crash may leave: equal states give equal images."""
        writes = self.pending + self.under_way
        return (hash(bytes(self.durable)), *(id(ticket) for ticket in writes))

    def crash_images(self, rng: random.Random) -> Iterator[bytes]:
        """Yield what a crash now may leave: every subset if there are few, some torn."""
        writes = self.pending + self.under_way
        if len(writes) <= SUBSETS_MAX:
            for kept in product((False, True), repeat=len(writes)):
                yield self._image(writes, [[each] * 8 for each in kept])
        else:
            yield self._image(writes, [[False]] * len(writes))
            yield self._image(writes, [[True]] * len(writes))
        for _ in range(RANDOM_IMAGES if writes else 0):
            sectors = [rng.choice(_TEARS) for _ in writes]
            yield self._image(writes, sectors)

    def _image(self, writes: list[Ticket], kept: list[list[bool]]) -> bytes:
        image = bytearray(self.durable)
        for ticket, sectors in zip(writes, kept, strict=True):
            _apply(image, ticket, sectors)
        return bytes(image)


# Which sectors of each block land: none, all, the first, all but it, a prefix, every other one.
_TEARS = [
    [False],
    [True],
    [True, False, False, False, False, False, False, False],
    [False, True, True, True, True, True, True, True],
    [True, True, True, False, False, False, False, False],
    [True, False],
]


def _apply(image: bytearray, ticket: Ticket, sectors: list[bool] | None = None) -> None:
    operation = ticket.operation
    assert isinstance(operation, Write)
    data, offset = operation.data, operation.offset
    if sectors is None or all(sectors):
        image[offset : offset + len(data)] = data
        return
    for nr, at in enumerate(range(0, len(data), SECTOR)):
        if sectors[nr % len(sectors)]:
            image[offset + at : offset + at + SECTOR] = data[at : at + SECTOR]


def drive(store: Store, steps: Steps[T]) -> T:
    """Run `steps` to their end, one operation after the other."""
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        if isinstance(operation, Read | Write | Flush):
            answer = store.do(operation)
        else:
            answer = tuple(store.do(each) for each in operation)


def cut(store: Store, steps: Steps[object], rng: random.Random) -> Iterator[bytes]:
    """Run `steps`; yield what a power cut may leave while each operation is under way, and after it."""
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration:
            return
        single = isinstance(operation, Read | Write | Flush)
        operations = (operation,) if single else operation
        tickets = [store.submit(each) for each in operations]  # type: ignore[arg-type]
        yield from store.crash_images(rng)
        answers = tuple(store.end(ticket) for ticket in tickets)
        yield from store.crash_images(rng)
        answer = answers[0] if single else answers


def read_image(image: bytes, steps: Steps[T]) -> T:
    """Run `steps`, which must not write, over `image`."""
    view = memoryview(image)
    answer: Answer | tuple[Answer, ...] = None
    while True:
        try:
            operation = steps.send(answer)
        except StopIteration as stop:
            result: T = stop.value
            return result
        answer = None
        if isinstance(operation, Read):
            answer = view[operation.offset : operation.offset + operation.length]
            assert len(answer) == operation.length
        elif not isinstance(operation, Flush):
            assert operation == (), "nothing but reads"
