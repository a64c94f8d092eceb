# SPDX-License-Identifier: Apache-2.0
"""Types of the extension module; `nbdtarget_fast.pyx` and its parts say what they mean."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final, Protocol

from nbdtarget_map import Windows
from nbdtarget_ring import Ring
from nbdtarget_sync import Syncer
from nbdtarget_tls import TlsRecords

Buffer = Any  # collections.abc.Buffer is new in Python 3.12

ABI: Final[int]
BOUNDS_NS: Final[tuple[int, ...]]
WRITE_PIECE_BYTES: Final[int]

DONE: Final = 0
SLOW: Final = 1
UNFINISHED: Final = 2
BLOCKED: Final = 3
TURN_OVER: Final = 4
CLOSED: Final = 5
FAILED: Final = 6
POLLED: Final = 7

def batches_received() -> int: ...
def choose_clock(clocksource: str = ...) -> bool: ...
def clock_ns() -> int: ...
def skew_clock(ahead_ns: int) -> bool: ...
def ns_of_ticks(
    first: tuple[int, int, int], last: tuple[int, int, int], ticks: int
) -> int | None: ...
def chosen_batches(ends_ns: Sequence[int]) -> list[bool]: ...

Answered = tuple[int, int, int, list[int]]

class ReadsInFlight(Protocol):
    """Of a mapped device."""

    def begin_reads(self, nr: int) -> None: ...
    def end_reads(self, nr: int) -> None: ...

class RingReads(Protocol):
    """What a connection has to do with its reads in the ring: see `nbdtarget.server.ring_reads`."""

    def is_alone(self) -> bool: ...
    def room(self) -> tuple[int, int]: ...
    def begun(self, nr: int, nr_bytes: int) -> None: ...
    def may_send(self) -> bool: ...
    def push(self, data: bytes, charge: int) -> None: ...
    def ended(self, nr: int, nr_bytes: int) -> None: ...
    def read_again(self, cookie: int, offset: int, length: int) -> None: ...

class Late(Protocol):
    """See `nbdtarget.server.poller.Lateness`."""

    late_ns: int

    def note_late(self) -> int: ...
    def note_hits(self, nr: int) -> None: ...

def write_pieces(
    fd: int, payload: Buffer, put: int, offset: int, piece: int
) -> tuple[int, int]: ...

class FastFile:
    size: int
    read_max: int
    read_flags: int
    write_max: int
    ring: Ring | None
    syncer: Syncer | None
    sync_wait_ns: int
    nr_synced: int
    ring_max: int
    align: int
    fake_misses: int
    fake_error: int
    fake_send_ns: int
    windows: Windows | None
    owner: int

    def __init__(
        self,
        fd: int,
        slow_ns: int,
        was_slow: Callable[[], None],
        was_unfinished: Callable[[int, int, int, int, int], None],
        note_reads: Callable[[int], None] | None = None,
        sync_left: Callable[[], None] | None = None,
        kick_failed: Callable[[int], None] | None = None,
        read_failed: Callable[[int], None] | None = None,
    ) -> None: ...

class Route:
    can_read: bool
    can_write: bool
    can_read_other: bool
    is_read_only: bool
    locked: Mapping[int, object] | None
    may_sync: Callable[[], bool] | None
    was_served: Callable[[int, int], None] | None
    in_flight: tuple[ReadsInFlight, ...]
    note_hit: Callable[[int], None] | None
    hold: Callable[[int], None] | None
    let_go: Callable[[int], None] | None

    @staticmethod
    def flat(file: FastFile, delta: int, size: int) -> Route: ...
    @staticmethod
    def by_bitmap(
        file: FastFile,
        other: FastFile | None,
        bits: Buffer,
        nr_bits: int,
        shift: int,
        begin: int,
        size: int,
    ) -> Route: ...
    @staticmethod
    def by_table(
        file: FastFile,
        blocks: Buffer,
        buckets: Buffer,
        chain: Buffer,
        bucket_shift: int,
        is_hit: Buffer,
        dirty: Buffer,
        discarded: Buffer,
        nr_discard_bits: int,
        discard_shift: int,
        block_size: int,
        nr_blocks: int,
        begin: int,
        size: int,
    ) -> Route: ...
    def close(self) -> None: ...

class Plane:
    begin: int
    end: int
    base: int
    out: int
    error: int
    put: int
    is_cut: bool
    was_batch: bool
    was_late: bool
    nr_hits: int
    nr_syncs: int
    loop_fd: int
    stay_ns: int
    stay_idle_ns: int

    def __init__(
        self,
        sock: int,
        received: Buffer,
        arena: Buffer,
        *,
        structured: bool,
        can_write: bool,
        size: int,
        zero_min: int,
        length_max: int,
        turn_ns: int,
        flush_at: int,
        poison: bool,
        ring_reads: RingReads | None = None,
        alone_max: int = 0,
        flush_for: Callable[[list[int], list[int]], None] | None = None,
        extended: bool = False,
        tls: TlsRecords | None = None,
    ) -> None: ...
    def release(self) -> None: ...
    def reads_ended(self, _: int) -> None: ...
    def leave_untimed(self, nr: int, usual_ns: int | None = None) -> None: ...
    def counted(self) -> tuple[Answered, Answered, Answered]: ...
    def take_syncs(self) -> tuple[list[int], list[int]]: ...
    def turn(
        self,
        route: Route,
        poll_ns: int,
        goes_on: bool,
        begin: int,
        end: int,
        base: int,
        out: int,
        lone: int = 0,
    ) -> int: ...

class Receiver:
    def __init__(
        self,
        plane: Plane,
        *,
        maybe_route: Callable[[], Route | None],
        is_plain: Callable[[], bool],
        received: object,
        output: object,
        polling: object,
        may_poll: Callable[[], bool],
        has_no_losses: Callable[[], bool],
        find_loop_fd: Callable[[], int] | None = None,
        poll_ns: int,
        poll_streak: int,
        poll_skip_max: int,
        poll_rest: int,
        late: Late,
        readable: Callable[[], None],
        stopped: Callable[[int], None],
        ended: Callable[[], None],
        failed: Callable[[Exception], None],
    ) -> None: ...
    def python_ran(self) -> None: ...
    def close(self) -> None: ...
    def __call__(self) -> None: ...
