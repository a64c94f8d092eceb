# SPDX-License-Identifier: Apache-2.0
"""I/O statistics of a mapped device: counters and latency histograms of its regions, as device-mapper's.

Theory of operation. A region is a range of sectors, cut into areas of one size. Each area has the thirteen
counters of the kernel, and a histogram of how long its requests took, if one was asked for. A program that
makes regions marks them with its program ID, and may note a word with each (`aux`).

A request counts once in each area that it touches, with the sectors that it has there. Discards and zeroing
count as writes; flushes and advice do not count. A request is "merged" when it begins where the one before it ended,
and both read, or both write. Failed requests count like others. A bio that waits in the queue of a suspended
device is not counted before it is let go; one that a target gives back into the queue stays under way.

Cost. While a device has a region, its fast path is off (`nbdtarget.dm.fast_path`), and each bio takes
one hook. Without one, nothing of this is on the way of a READ or WRITE.

Memory. Areas are made when they are first touched, and there are AREAS_MAX of them in one device.

Times are taken in nanoseconds. A region that is not `precise` tells milliseconds, the boundaries of its histogram
included; the kernel's have the coarseness of its clock tick.

Source of the formats: Documentation/admin-guide/device-mapper/statistics.rst.
"""

import asyncio
import errno as errnos
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise
from typing import Final

import msgspec

from nbdtarget.bio import OP_CACHE, OP_FLUSH, OP_READ, Bio
from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import TableError
from nbdtarget.common.units import SECTOR

__all__ = ["AREAS_MAX", "AreaState", "RegionState", "Statistics"]

AREAS_MAX: Final = 1 << 16
BOUNDS_MAX: Final = 256
LINES_AT_ONCE_MAX: Final = 1024  # printed between two turns of the loop
MS_NS: Final = 1_000_000
_END_MAX: Final = (1 << 63) // SECTOR
_READ: Final = 0
_WRITE: Final = 1


class AreaState(msgspec.Struct, frozen=True):
    """The counters of one area, for another process; as in `_Area`."""

    nr: tuple[int, int]
    merged: tuple[int, int]
    sectors: tuple[int, int]
    taken_ns: tuple[int, int]
    busy_ns: tuple[int, int]
    total_busy_ns: int
    queued_ns: int
    histogram: tuple[int, ...]


class RegionState(msgspec.Struct, frozen=True):
    """One region with its areas, for another process; as in `_Region`."""

    number: int
    start: int
    end: int
    step: int
    is_precise: bool
    bounds: tuple[int, ...]
    program: str
    aux: str
    areas: dict[int, AreaState]


class _Area:
    """The counters of one area, by direction where they are lists; times in nanoseconds."""

    __slots__ = (
        "busy_ns",
        "histogram",
        "in_flight",
        "merged",
        "nr",
        "queued_ns",
        "sectors",
        "since_ns",
        "taken_ns",
        "total_busy_ns",
    )

    def __init__(self, nr_buckets: int, now_ns: int) -> None:
        self.in_flight = [0, 0]
        self.since_ns = now_ns
        self._zero(nr_buckets)

    def _zero(self, nr_buckets: int) -> None:
        self.nr = [0, 0]
        self.merged = [0, 0]
        self.sectors = [0, 0]
        self.taken_ns = [0, 0]
        self.busy_ns = [0, 0]
        self.total_busy_ns = 0
        self.queued_ns = 0
        self.histogram = [0] * nr_buckets

    def clear(self, now_ns: int) -> None:
        """Count from 0 again; what is in flight stays so."""
        self.since_ns = now_ns
        self._zero(len(self.histogram))

    def tick(self, now_ns: int) -> None:
        """Add the time since the last call to what was in flight meanwhile."""
        spent = now_ns - self.since_ns
        self.since_ns = now_ns
        reads, writes = self.in_flight
        if reads:
            self.busy_ns[_READ] += spent
        if writes:
            self.busy_ns[_WRITE] += spent
        if reads or writes:
            self.total_busy_ns += spent
            self.queued_ns += (reads + writes) * spent

    def state(self) -> AreaState:
        """The counters; nothing is in flight."""
        pairs = (self.nr, self.merged, self.sectors, self.taken_ns, self.busy_ns)
        nr, merged, sectors, taken_ns, busy_ns = ((each[0], each[1]) for each in pairs)
        return AreaState(
            nr,
            merged,
            sectors,
            taken_ns,
            busy_ns,
            self.total_busy_ns,
            self.queued_ns,
            tuple(self.histogram),
        )

    def restore(self, state: AreaState) -> None:
        """Go on counting from `state`."""
        self.nr, self.merged = list(state.nr), list(state.merged)
        self.sectors, self.taken_ns = list(state.sectors), list(state.taken_ns)
        self.busy_ns = list(state.busy_ns)
        self.total_busy_ns, self.queued_ns = state.total_busy_ns, state.queued_ns
        self.histogram = list(state.histogram)

    def words(self, unit_ns: int) -> str:
        """Return the counters as `@stats_print` prints them, after the range."""
        counters: list[int] = []
        for way in (_READ, _WRITE):
            taken = self.taken_ns[way] // unit_ns
            counters += self.nr[way], self.merged[way], self.sectors[way], taken
        counters.append(sum(self.in_flight))
        for time_ns in (self.total_busy_ns, self.queued_ns, *self.busy_ns):
            counters.append(time_ns // unit_ns)
        words = " ".join(map(str, counters))
        if self.histogram:
            words += " " + ":".join(map(str, self.histogram))
        return words


class _Region:
    """Sectors `start` to `end`, in areas of `step` sectors."""

    def __init__(self, start: int, end: int, step: int) -> None:
        self.start = start
        self.end = end
        self.step = step
        self.is_precise = False
        self.bounds: tuple[int, ...] = ()
        self.program = ""
        self.aux = ""
        self.areas: dict[int, _Area] = {}

    @property
    def nr_areas(self) -> int:
        return -(-(self.end - self.start) // self.step)

    @property
    def unit_ns(self) -> int:
        """The unit of its times, in ns."""
        return 1 if self.is_precise else MS_NS

    def area(self, index: int, now_ns: int) -> _Area:
        found = self.areas.get(index)
        if found is None:
            found = self.areas[index] = self._new_area(now_ns)
        return found

    def _new_area(self, now_ns: int) -> _Area:
        return _Area(len(self.bounds) + 1 if self.bounds else 0, now_ns)

    def parts(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        """(index of an area, sectors there) of a range of sectors."""
        at = max(begin, self.start)
        end = min(end, self.end)
        while at < end:
            index = (at - self.start) // self.step
            stop = min(end, self.start + (index + 1) * self.step)
            yield index, stop - at
            at = stop

    def line(self, number: int) -> str:
        """Return the region as a line of `@stats_list`."""
        words = [
            f"{number}: {self.start}+{self.end - self.start} {self.step}",
            self.program or "-",
            self.aux or "-",
        ]
        if self.is_precise:
            words.append("precise_timestamps")
        if self.bounds:
            words.append("histogram:" + ",".join(map(str, self.bounds)))
        return " ".join(words)

    def lines(self, first: int, end: int, now_ns: int) -> Iterator[str]:
        untouched = self._new_area(now_ns)
        for index in range(first, end):
            area = self.areas.get(index, untouched)
            area.tick(now_ns)
            start = self.start + index * self.step
            yield f"{start}+{self.step} {area.words(self.unit_ns)}"

    def clear(self, first: int, end: int, now_ns: int) -> None:
        for index in range(first, end):
            if index in self.areas:
                self.areas[index].clear(now_ns)


class _Counted:
    """The hook of one bio: what it has touched, to be counted when it ends."""

    __slots__ = ("begun_ns", "is_merged", "statistics", "touched", "way")

    def __init__(
        self,
        statistics: "Statistics",
        way: int,
        begun_ns: int,
        touched: list[tuple[_Region, _Area, int]],
        *,
        is_merged: bool,
    ) -> None:
        self.statistics = statistics
        self.way = way
        self.begun_ns = begun_ns
        self.touched = touched
        self.is_merged = is_merged

    def __call__(self, _: Bio) -> None:
        now_ns = self.statistics.clock.now_ns()
        way, taken_ns = self.way, now_ns - self.begun_ns
        for region, area, sectors in self.touched:
            area.tick(now_ns)
            area.in_flight[way] -= 1
            area.nr[way] += 1
            area.merged[way] += self.is_merged
            area.sectors[way] += sectors
            area.taken_ns[way] += taken_ns
            if area.histogram:
                bucket = bisect_right(region.bounds, taken_ns // region.unit_ns)
                area.histogram[bucket] += 1


class Statistics:
    """The regions of one mapped device, and the messages about them.

    Args:
        changed: called when the first region is made, and when the last one is deleted.
    """

    def __init__(self, clock: Clock, changed: Callable[[], None]) -> None:
        self.clock = clock
        self._changed = changed
        self._regions: dict[int, _Region] = {}
        self._last: tuple[int, int] | None = None  # where the last one ended, its way

    def __bool__(self) -> bool:
        return bool(self._regions)

    def states(self) -> tuple[RegionState, ...]:
        """All regions with their counters, for another process."""
        return tuple(
            RegionState(
                number,
                region.start,
                region.end,
                region.step,
                region.is_precise,
                region.bounds,
                region.program,
                region.aux,
                {index: area.state() for index, area in region.areas.items()},
            )
            for number, region in self._regions.items()
        )

    def restore(self, states: Iterable[RegionState]) -> None:
        """Make the regions of another process, with their counters. Those that are here already stay as they are."""
        now_ns = self.clock.now_ns()
        for state in states:
            if state.number in self._regions:
                continue
            region = _Region(state.start, state.end, state.step)
            region.is_precise, region.bounds = state.is_precise, state.bounds
            region.program, region.aux = state.program, state.aux
            for index, counters in state.areas.items():
                region.area(index, now_ns).restore(counters)
            self._regions[state.number] = region
            if len(self._regions) == 1:
                self._changed()

    def begin(self, bio: Bio) -> None:
        """Count a bio that is about to be mapped, and its end, unless `pass_over` was called with it."""
        op = bio.op
        if op in (OP_FLUSH, OP_CACHE) or not bio.length:
            return
        if bio.hooks is not None and self._passed_over in bio.hooks:
            return
        way = _READ if op == OP_READ else _WRITE
        begin = bio.offset // SECTOR
        end = -(-(bio.offset + bio.length) // SECTOR)
        is_merged = self._last == (begin, way)
        self._last = (end, way)
        now_ns = self.clock.now_ns()
        touched = []
        for region in self._regions.values():
            for index, sectors in region.parts(begin, end):
                area = region.area(index, now_ns)
                area.tick(now_ns)
                area.in_flight[way] += 1
                touched.append((region, area, sectors))
        if touched:
            bio.on_end(_Counted(self, way, now_ns, touched, is_merged=is_merged))

    def pass_over(self, bio: Bio) -> None:
        """A target gives the bio back, to be mapped anew: it, or what it is a part of, has been counted."""
        bio.on_end(self._passed_over)

    def _passed_over(self, _: Bio) -> None:
        """The hook that marks such a bio."""

    # ---- messages ----

    async def message(self, words: Sequence[str], size_sectors: int) -> str | None:
        """Carry out an `@stats_…` message; the answer to print, or None.

        Args: size_sectors: of the device, which `-` stands for.
        Raises: TableError, EINVAL; ENOENT: there is no region of this number.
        """
        match [words[0].lower(), *words[1:]]:
            case ["@stats_create", range_, step, *more]:
                return str(self._create(range_, step, more, size_sectors))
            case ["@stats_delete", number]:
                self._region(number)
                del self._regions[int(number)]
                if not self._regions:
                    self._changed()
            case ["@stats_clear", number]:
                region = self._region(number)
                region.clear(0, region.nr_areas, self.clock.now_ns())
            case ["@stats_list", *program] if len(program) < 2:
                lines = [
                    region.line(each)
                    for each, region in sorted(self._regions.items())
                    if program in ([], [region.program])
                ]
                return "\n".join(lines) or None
            case ["@stats_print" | "@stats_print_clear" as verb, number, *lines] if len(
                lines
            ) in (0, 2):
                return await self._print(number, lines, clears=verb != "@stats_print")
            case ["@stats_set_aux", number, aux]:
                self._region(number).aux = "" if aux == "-" else aux
            case _:
                raise TableError(
                    f"Invalid parameters for message {words[0]}: Invalid argument"
                )
        return None

    def _region(self, number: str) -> _Region:
        region = self._regions.get(_number(number))
        if region is None:
            raise TableError(
                f"No such file or directory: there is no region {number}", errnos.ENOENT
            )
        return region

    async def _print(
        self, number: str, lines: Sequence[str], *, clears: bool
    ) -> str | None:
        """Disks get a turn of the loop now and then: there may be many lines."""
        region = self._region(number)
        first = _number(lines[0]) if lines else 0
        end = first + _number(lines[1]) if lines else region.nr_areas
        end = min(end, region.nr_areas)
        told: list[str] = []
        for begin in range(first, end, LINES_AT_ONCE_MAX):
            if told:
                await asyncio.sleep(0)
            stop = min(begin + LINES_AT_ONCE_MAX, end)
            now_ns = self.clock.now_ns()
            told += region.lines(begin, stop, now_ns)
            if clears:
                region.clear(begin, stop, now_ns)
        return "\n".join(told) or None

    def _create(
        self, range_: str, step: str, more: Sequence[str], size_sectors: int
    ) -> int:
        region = _Region(*_range_and_step(range_, step, size_sectors))
        nr_options = 0
        if more and more[0].isascii() and more[0].isdecimal():
            nr_options = _number(more[0])
            more = more[1:]
        options, names = more[:nr_options], more[nr_options:]
        if len(options) < nr_options or len(names) > 2:
            raise TableError("Invalid parameters for message @stats_create")
        for option in options:
            if option.lower() == "precise_timestamps":
                region.is_precise = True
            elif option.lower().startswith("histogram:") and not region.bounds:
                region.bounds = _bounds(option.partition(":")[2])
            else:
                raise TableError(f"Invalid argument: {option}")
        region.program, region.aux = (
            "" if name == "-" else name for name in [*names, "-", "-"][:2]
        )
        nr_areas = sum(each.nr_areas for each in self._regions.values())
        if nr_areas + region.nr_areas > AREAS_MAX:
            raise TableError(
                f"Cannot allocate memory: a device has at most {AREAS_MAX} areas",
                errnos.ENOMEM,
            )
        number = next(
            each for each in range(AREAS_MAX + 1) if each not in self._regions
        )
        self._regions[number] = region
        if len(self._regions) == 1:
            self._changed()
        return number


def _number(word: str) -> int:
    if not (word.isascii() and word.isdecimal() and len(word) <= 20):
        raise TableError(f"Invalid argument: {word!r} is not a number")
    return int(word)


def _range_and_step(range_: str, step: str, size_sectors: int) -> tuple[int, int, int]:
    """Returns: start, end, step; sectors."""
    if range_ == "-":
        start, end = 0, size_sectors or 1
    else:
        match = re.fullmatch(r"([0-9]{1,20})\+([0-9]{1,20})", range_)
        if match is None:
            raise TableError(f"Invalid argument: {range_!r} is not START+LENGTH or -")
        start = int(match[1])
        end = start + int(match[2])
    if not start < end <= _END_MAX:
        raise TableError(f"Invalid argument: no sectors in {range_}")
    is_count = step.startswith("/")
    number = _number(step.removeprefix("/"))
    if not number:
        raise TableError("Invalid argument: an area needs at least one sector")
    return start, end, -(-(end - start) // number) if is_count else number


def _bounds(text: str) -> tuple[int, ...]:
    bounds = tuple(_number(word) for word in text.split(","))
    if len(bounds) > BOUNDS_MAX:
        raise TableError(f"Invalid argument: more than {BOUNDS_MAX} boundaries")
    if any(low >= high for low, high in pairwise(bounds)):
        raise TableError("Invalid argument: boundaries must be in ascending order")
    return bounds
