# SPDX-License-Identifier: Apache-2.0
"""Tables: their text, and the targets that it becomes.

Theory of operation. A table is a list of targets that cover a device from sector 0 without
a gap. Its text has one line a target, `start length type args…`, in sectors of 512 bytes;
blank lines and lines that begin with `#` say nothing. `parse_table` looks at everything that
can be judged without opening a device, on all lines, before the first constructor runs: a
typing error in the last line must not have opened (or created) what the first line names.

A `Table` is built complete, or not at all: when one constructor refuses, the targets
before it are destroyed again. It lives in the inactive slot, then in the active one, and is
destroyed once. While a target's coroutine runs (status, message, extents), the table is held
with `use()`, and it is not destroyed before all of these have ended.
"""

import asyncio
import errno as errnos
import logging
from bisect import bisect_right
from collections.abc import (
    Awaitable,
    Callable,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import contextmanager
from typing import Final, NamedTuple

from nbdtarget.common.clock import Clock, sleep, timeout
from nbdtarget.common.errors import ConstructorError, TableError
from nbdtarget.common.turns import to_the_end
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import split_words
from nbdtarget.devices.base import (
    EXTENTS_MAX,
    Device,
    Extent,
    QueueLimits,
    append_extent,
)
from nbdtarget.targets.base import StatusFields, Target, TargetContext

__all__ = [
    "FAILED_DRAIN_S_MAX",
    "TARGETS_AT_ONCE",
    "Ask",
    "Table",
    "TableMistake",
    "TargetSpec",
    "construct_table",
    "parse_table",
    "scan_table",
]

log = logging.getLogger(__name__)

TARGETS_MAX: Final = 65536  # lines of one table
TARGETS_AT_ONCE: Final = 256  # of a long table: between them the loop has its turns
FAILED_DRAIN_S_MAX: Final = 5.0  # a failed target may have lost bios: wait no longer
_END_SECTORS_MAX: Final = (1 << 63) // SECTOR - 1


class TargetSpec(NamedTuple):
    """One line of a table, checked but not constructed. `begin` and `length` are bytes."""

    begin: int
    length: int
    type_name: str
    args: tuple[str, ...]


class TableMistake(NamedTuple):
    """A mistake in a table. `line_nr` counts from 1; 0: the table as a whole."""

    line_nr: int
    reason: str


def parse_table(text: str, types: Mapping[str, type[Target]]) -> tuple[TargetSpec, ...]:
    """Parse the text of a table; at least one line.

    Raises: TableError, EINVAL: a line is not `start length type args…`, lines leave a gap or
        overlap, a length is 0, or a type is unknown.
    """
    specs, mistakes = scan_table(text, types)
    if mistakes:
        raise TableError(mistakes[0].reason)
    return tuple(specs)


def scan_table(
    text: str, types: Mapping[str, type[Target]]
) -> tuple[list[TargetSpec], list[TableMistake]]:
    """As `parse_table`, but tell all that is wrong."""
    specs: list[TargetSpec] = []
    mistakes: list[TableMistake] = []
    end_sectors: int | None = 0  # None: a line that told it could not be read
    # Not splitlines: what else Unicode calls the end of a line may stand in a path, quoted.
    for line_nr, line in enumerate(text.split("\n"), 1):
        stripped = line.strip()
        if not stripped or stripped.startswith("#"):
            continue
        if len(specs) == TARGETS_MAX:
            reason = f"More than {TARGETS_MAX} targets in table"
            mistakes.append(TableMistake(line_nr, reason))
            break
        spec = _maybe_spec(stripped)
        if spec is None:
            reason = (
                f"Invalid format on line {line_nr} of table:"
                " expected `start length type args…'"
            )
            mistakes.append(TableMistake(line_nr, reason))
            end_sectors = None
            continue
        reasons = _line_mistakes(spec, types, end_sectors, line_nr)
        mistakes += [TableMistake(line_nr, reason) for reason in reasons]
        end_sectors = (spec.begin + spec.length) // SECTOR
        specs.append(spec)
    if not specs and not mistakes:
        mistakes.append(TableMistake(0, "Empty table"))
    return specs, mistakes


def _line_mistakes(
    spec: TargetSpec,
    types: Mapping[str, type[Target]],
    end_sectors: int | None,
    line_nr: int,
) -> Iterator[str]:
    """Yield the mistakes in one line; the line before it ended at `end_sectors`."""
    start_sectors = spec.begin // SECTOR
    if spec.length == 0:
        yield f"zero-length target on line {line_nr} of table"
    if spec.type_name not in types:
        known = ", ".join(sorted(types))
        yield f"{spec.type_name}: unknown target type: there are {known}"
    if end_sectors is not None and start_sectors != end_sectors:
        yield (
            f"{spec.type_name}: Gap in table: line {line_nr} starts at sector"
            f" {start_sectors} instead of {end_sectors}"
        )
    elif (spec.begin + spec.length) // SECTOR > _END_SECTORS_MAX:
        yield f"Target on line {line_nr} of table is too large"


def _maybe_spec(line: str) -> TargetSpec | None:
    words = split_words(line)
    if len(words) < 3 or not all(
        word.isascii() and word.isdecimal() and len(word) <= 20 for word in words[:2]
    ):
        return None
    start_sectors, length_sectors = int(words[0]), int(words[1])
    return TargetSpec(
        start_sectors * SECTOR, length_sectors * SECTOR, words[2], tuple(words[3:])
    )


# A question to each target about a range of its bytes.
Ask = Callable[[Target, int, int], Awaitable[list[Extent]]]


class Table:
    """The targets of one table, in order.

    Attributes:
        targets: at least one.
        begins: bytes; where each target begins, ascending from 0.
        size: bytes, of all targets together.
        read_only: loaded read-only.
        failed: a target broke one of our own invariants; nothing is asked of it any more.
        has_stopped: no target has anything under way that did not end in time.
    """

    def __init__(self, targets: Sequence[Target], *, read_only: bool) -> None:
        assert targets
        self.targets = tuple(targets)
        self.begins = [target.begin for target in self.targets]
        last = self.targets[-1]
        self.size = last.begin + last.length
        self.read_only = read_only
        self.failed = False
        self.has_stopped = True
        self._users = 0
        self._unused: asyncio.Future[None] | None = None

    def target_at(self, offset: int) -> Target:
        """The target that holds byte `offset`, which must be inside the table."""
        assert 0 <= offset < self.size
        return self.targets[bisect_right(self.begins, offset) - 1]

    def has_lost_writes(self) -> bool:
        """Whether it has failed, or a target has lost writes (`Target.has_lost_writes`)."""
        return self.failed or any(each.has_lost_writes() for each in self.targets)

    def maybe_target_of(self, context: TargetContext) -> Target | None:
        """The target that was constructed with `context`, if it is ours."""
        return next((each for each in self.targets if each.ctx is context), None)

    def replaced(self, old: Target, new: Target) -> "Table":
        """The same table, but for one target."""
        targets = [new if each is old else each for each in self.targets]
        return Table(targets, read_only=self.read_only)

    def runs(self, offset: int, length: int) -> list[tuple[Target, int]]:
        """Cut a range inside the table at target borders: (target, bytes), in order."""
        assert offset + length <= self.size
        index = bisect_right(self.begins, offset) - 1
        runs = []
        while length:
            target = self.targets[index]
            part = min(length, target.begin + target.length - offset)
            runs.append((target, part))
            offset += part
            length -= part
            index += 1
        return runs

    def devices(self) -> Iterator[Device]:
        """Every device below, once per use."""
        for target in self.targets:
            yield from target.iterate_devices()

    def data_devices(self) -> tuple[Device, ...]:
        """Every device below that holds what clients have written, once."""
        found = {
            id(device): device
            for target in self.targets
            for device in target.data_devices()
        }
        return tuple(found.values())

    @property
    def limits(self) -> QueueLimits:
        """Return the limits that suit all targets and the devices below them."""
        limits = QueueLimits()
        for target in self.targets:
            below = QueueLimits()
            for device in target.iterate_devices():
                below = below.stacked(device.limits)
            limits = limits.stacked(target.io_hints(below))
        return limits

    def lines(self, words: Callable[[Target], str]) -> list[tuple[int, int, str, str]]:
        """A line for each target, with what `words` says of it: (start, length, type, params), in sectors."""
        return [_line(target, words(target)) for target in self.targets]

    async def lines_in_turns(
        self, words: Callable[[Target], str]
    ) -> list[tuple[int, int, str, str]]:
        """As `lines`. If the table is long, the loop has its turns in between."""
        lines = []
        with self.use():
            for nr, target in enumerate(self.targets, 1):
                lines.append(_line(target, words(target)))
                await _maybe_yield(nr)
        return lines

    async def status(
        self, *, noflush: bool, within_s: float | None
    ) -> list[tuple[tuple[int, int, str, str], StatusFields]]:
        """INFO of each target: its line, and the fields that it tells by name.

        Args: within_s: how long the commit of each target may take; None: for ever.
        Raises: TableError, ETIMEDOUT.
        """
        lines = []
        with self.use():
            for nr, target in enumerate(self.targets, 1):
                params = "Fail"
                if not self.failed:
                    params = await self._status_of(target, noflush, within_s)
                fields = {} if self.failed else target.status_fields()
                lines.append((_line(target, params), fields))
                await _maybe_yield(nr)
        return lines

    async def _status_of(
        self, target: Target, noflush: bool, within_s: float | None
    ) -> str:
        try:
            async with timeout(within_s):
                return await target.status(noflush=noflush)
        except TimeoutError:
            raise TableError(
                f"{self.unanswered()} for {within_s:g} s, and so no commit;"
                " --noflush shows what is known without one",
                errnos.ETIMEDOUT,
            ) from None

    async def describe(self, offset: int, length: int, ask: Ask) -> list[Extent]:
        """Return the targets' answers for a range inside the table, or for its beginning."""
        answer: list[Extent] = []
        with self.use():
            for target, part in self.runs(offset, length):
                end = offset + part
                for extent in await ask(target, offset, part):
                    append_extent(answer, *extent)
                    offset += extent.length
                if offset < end or len(answer) >= EXTENTS_MAX:
                    break  # the target told less than it was asked, or this is enough
        return answer

    def unanswered(self) -> str:
        """Which devices below have not answered, for example "no answer from FILE (3 requests)"."""
        devices = [each for each in self.devices() if each.nr_in_flight]
        if not devices:
            return "I/O below has not ended"
        names = ", ".join(
            f"{each.name} ({each.nr_in_flight} requests)" for each in devices
        )
        return f"no answer from {names}"

    def guarded(self, name: str, call: Callable[[], None]) -> None:
        """Call a target's; if it raises, the table has failed. `name`: of the device, for the log."""
        try:
            call()
        except Exception:
            log.exception("%s: %r failed: device fails", name, call)
            self.failed = True

    async def preresume(self, name: str, clock: Clock) -> None:
        """Have every target get ready for I/O, or none: after a refusal those that were ready are stopped again.

        Also if the caller is cancelled, this ends only when nothing is under way any more: half of a start may
        have been written, and a commit goes on by itself.

        Args: name, clock: of the mapped device.
        Raises: TableError: refused. Every target is suspended as before.
        """
        if self.failed:
            raise TableError("the table has failed: load another", errnos.EIO)
        ready: list[Target] = []
        try:
            await to_the_end(self._preresume(ready))
        except BaseException:
            await to_the_end(self.stop(ready, name, clock))
            raise

    async def _preresume(self, ready: list[Target]) -> None:
        for target in self.targets:
            try:
                await target.preresume()
            except TableError as error:
                reason = f"{target.type_name}: {error}"
                raise TableError(reason, error.errno) from error
            ready.append(target)

    async def stop(self, targets: Iterable[Target], name: str, clock: Clock) -> None:
        """Stop `targets`, which commit; if one raises, the table has failed."""
        for target in targets:
            await self._postsuspend(target, name, clock)

    async def _postsuspend(self, target: Target, name: str, clock: Clock) -> None:
        if self.failed:
            await self._postsuspend_failed(target, name, clock)
            return
        try:
            await target.postsuspend()
        except Exception:
            log.exception("%s: postsuspend failed: device fails", name)
            self.failed = True

    async def _postsuspend_failed(
        self, target: Target, name: str, clock: Clock
    ) -> None:
        """As `_postsuspend`, of a target that may wait for bios that it has lost: for a bounded time."""
        stopping = asyncio.ensure_future(target.postsuspend())
        timer = clock.call_later(FAILED_DRAIN_S_MAX, lambda: _cancel(stopping))
        done, _ = await asyncio.wait([stopping])
        timer.cancel()
        (task,) = done
        if task.cancelled() or task.exception() is not None:
            self.has_stopped = False
            log.error(
                "%s: %s did not stop: %r",
                name,
                target.type_name,
                "given up" if task.cancelled() else task.exception(),
            )

    @contextmanager
    def use(self) -> Iterator[None]:
        """Keep the targets from being destroyed while one of their coroutines runs."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0 and self._unused is not None:
                self._unused.set_result(None)
                self._unused = None

    async def unused(self) -> None:
        """Wait until no `use()` is left; only then may the targets be destroyed."""
        if self._users:
            self._unused = asyncio.get_running_loop().create_future()
            await self._unused


def _cancel(task: "asyncio.Future[None]") -> None:
    task.cancel()


async def _maybe_yield(nr_done: int) -> None:
    """Let the loop have a turn after each `TARGETS_AT_ONCE` targets.

    This is no asynchronous generator: a status that is given up would leave one behind.
    """
    if nr_done % TARGETS_AT_ONCE == 0:
        await sleep(0)


def _line(target: Target, params: str) -> tuple[int, int, str, str]:
    return (
        target.begin // SECTOR,
        target.length // SECTOR,
        target.type_name,
        params,
    )


async def construct_table(
    specs: Sequence[TargetSpec],
    types: Mapping[str, type[Target]],
    make_context: Callable[[TargetSpec], TargetContext],
    *,
    read_only: bool,
) -> Table:
    """Run the constructors in order.

    Raises: ConstructorError: one refuses, or two want the same device each for itself; the
        targets constructed so far are destroyed again.
    """
    targets: list[Target] = []
    taken: set[int] = set()
    try:
        for nr, spec in enumerate(specs, 1):
            if nr % TARGETS_AT_ONCE == 0:
                await sleep(0)
            target_type = types[spec.type_name]
            target = await target_type.ctr(make_context(spec), spec.args)
            assert (target.begin, target.length) == (spec.begin, spec.length)
            targets.append(target)
            _refuse_sharing(target, taken)
    except BaseException as error:
        for target in reversed(targets):
            await target.dtr()
        if isinstance(error, ConstructorError) and not error.target:
            error.target = spec.type_name
        raise
    return Table(targets, read_only=read_only)


def _refuse_sharing(target: Target, taken: set[int]) -> None:
    """Raise ConstructorError if `target` wants for itself what one before it has.

    Args:
        taken: ids of the devices that belong to one target alone; those of `target` are added.
    """
    own = {id(device): device for device in target.exclusive_devices()}
    for key in own.keys() & taken:
        raise ConstructorError(
            f"{own[key].name}: belongs to another target of this table",
            errnos.EBUSY,
            target.type_name,
        )
    taken.update(own)
