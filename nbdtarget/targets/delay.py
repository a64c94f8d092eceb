# SPDX-License-Identifier: Apache-2.0
"""The `delay` target: each bio waits before it goes on.

    <dev> <offset> <ms> [<write dev> <offset> <ms> [<flush dev> <offset> <ms>]]

Theory of operation. Three classes of bios have a device, an offset and a delay each: reads (and
hints of reads), writes (zeroing and discards too), flushes. With three words all three classes share
them; with six, writes and flushes share the second set.

A delay of 0 sends the bio on at once. Any other puts it into one heap, by when it is due and then by
when it came, and one timer waits for the first of them: never early, and late by a millisecond at
most, plus what the loop is busy with. Delays nothing while suspended: `presuspend` sends
everything on at once, in the order in which it was due.

A bio that waits owns its payload. There is no bound here: every submitter has its own.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import Final

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, Bio
from nbdtarget.common.clock import Timer
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device, Extent
from nbdtarget.targets.arguments import (
    UINT32_MAX,
    Run,
    Runs,
    close_all,
    parse_sectors,
    parse_uint,
)
from nbdtarget.targets.base import (
    REMAPPED,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)

__all__ = ["DelayTarget"]

_MS_NS: Final = 1_000_000
_MS_S: Final = 0.001
# Seconds are floats: a timer may come this much before the nanosecond that was meant.
_ROUNDING_NS: Final = 1000


class _Class:
    """One kind of bios: where they go, after what delay, and how many of them wait."""

    __slots__ = ("delay_ms", "nr_waiting", "run")

    def __init__(self, run: Run, delay_ms: int) -> None:
        self.run = run
        self.delay_ms = delay_ms
        self.nr_waiting = 0

    @property
    def words(self) -> str:
        return f"{self.run.words} {self.delay_ms}"


class DelayTarget(Target):
    """See the module head. Source: drivers/md/dm-delay.c."""

    type_name = "delay"
    version = (1, 4, 0)

    def __init__(self, ctx: TargetContext, classes: Sequence[tuple[Run, int]]) -> None:
        """Args: classes: as many as the line has words for; (where, milliseconds)."""
        super().__init__(ctx)
        self._given = len(classes)
        reads, writes, flushes = (classes[min(at, len(classes) - 1)] for at in range(3))
        self._reads = _Class(*reads)
        self._writes = _Class(*writes)
        self._flushes = _Class(*flushes)
        self._waiting: list[tuple[int, int, _Class, Bio]] = []
        self._order = 0
        self._timer: Timer | None = None
        self._timer_due_ns = 0
        self._may_delay = True
        below = self._writes.run.device
        self.can_discard = below.can_discard
        self.can_write_zeroes = below.can_write_zeroes
        self.can_fast_zero = below.can_fast_zero

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "DelayTarget":
        if len(args) not in (3, 6, 9):
            raise _error("Requires exactly 3, 6 or 9 arguments")
        async with Runs(ctx, cls.type_name) as runs:
            classes = []
            for name, offset, delay in zip(
                args[::3], args[1::3], args[2::3], strict=True
            ):
                start_sectors = parse_sectors(offset)
                if start_sectors is None:
                    raise _error("Invalid device sector")
                delay_ms = parse_uint(delay, UINT32_MAX)
                if delay_ms is None:
                    raise _error("Invalid delay")
                run = await runs.open(name, start_sectors, ctx.length)
                classes.append((run, delay_ms))
            return cls(ctx, classes)

    async def dtr(self) -> None:
        assert not self._waiting
        await close_all(self.ctx, self.iterate_devices())

    def map(self, bio: Bio) -> int:
        op = bio.op
        if op in (OP_READ, OP_CACHE):
            kind = self._reads
        elif op == OP_FLUSH:
            kind = self._flushes
        else:
            kind = self._writes
        device, start = kind.run
        bio.device = device
        if op != OP_FLUSH:
            bio.offset += start - self.begin
        if not kind.delay_ms or not self._may_delay:
            return REMAPPED
        bio.own()
        due_ns = self.ctx.clock.now_ns() + kind.delay_ms * _MS_NS
        self._order += 1
        heapq.heappush(self._waiting, (due_ns, self._order, kind, bio))
        kind.nr_waiting += 1
        if self._timer is None or due_ns < self._timer_due_ns:
            self._set_timer(due_ns, kind.delay_ms * _MS_S)
        return SUBMITTED

    def push_back(self) -> list[Bio]:
        waiting, self._waiting = self._waiting, []
        bios = []
        for entry in sorted(waiting, key=lambda entry: entry[1]):
            _, _, kind, bio = entry
            if bio.op == OP_FLUSH:
                heapq.heappush(self._waiting, entry)
                continue
            kind.nr_waiting -= 1
            bio.offset -= kind.run.start - self.begin
            bios.append(bio)
        return bios

    def presuspend(self) -> None:
        self._may_delay = False
        self._cancel_timer()
        while self._waiting:
            self._send_first()

    def presuspend_undo(self) -> None:
        self._may_delay = True

    def resume(self) -> None:
        self._may_delay = True

    def _set_timer(self, due_ns: int, delay_s: float) -> None:
        self._cancel_timer()
        self._timer_due_ns = due_ns
        self._timer = self.ctx.clock.call_later(delay_s, self._send_due)

    def _cancel_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _send_due(self) -> None:
        self._timer = None
        now_ns = self.ctx.clock.now_ns()
        while self._waiting and self._waiting[0][0] <= now_ns + _ROUNDING_NS:
            self._send_first()
        if not self._waiting:
            return
        # The bios that ended just now may have brought new ones, and a timer for a later one.
        due_ns = self._waiting[0][0]
        if self._timer is None or due_ns < self._timer_due_ns:
            self._set_timer(due_ns, max((due_ns - now_ns) / 1e9, _MS_S))

    def _send_first(self) -> None:
        _, _, kind, bio = heapq.heappop(self._waiting)
        kind.nr_waiting -= 1
        bio.device.submit(bio)

    async def status(self, *, noflush: bool = False) -> str:
        kinds = (self._reads, self._writes, self._flushes)
        return " ".join(str(kind.nr_waiting) for kind in kinds)

    def status_fields(self) -> StatusFields:
        return {
            "nr_reads_waiting": self._reads.nr_waiting,
            "nr_writes_waiting": self._writes.nr_waiting,
            "nr_flushes_waiting": self._flushes.nr_waiting,
        }

    def table_words(self) -> str:
        kinds = (self._reads, self._writes, self._flushes)
        return " ".join(kind.words for kind in kinds[: self._given])

    async def extents(self, offset: int, length: int) -> list[Extent]:
        device, start = self._reads.run
        return await device.extents(offset - self.begin + start, length)

    @property
    def contexts(self) -> tuple[str, ...]:
        return self._reads.run.device.contexts

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        device, start = self._reads.run
        at = offset - self.begin + start
        return await device.context_extents(context, at, length)

    def iterate_devices(self) -> Iterable[Device]:
        return [kind.run.device for kind in (self._reads, self._writes, self._flushes)]


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=DelayTarget.type_name)
