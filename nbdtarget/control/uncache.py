# SPDX-License-Identifier: Apache-2.0
"""`UncacheJob`: write a cache back and remove it, while clients go on using the disk.

Theory of operation. The process that serves the cache goes on serving it. The job asks for one table after another with the verbs of the
control socket: in that process itself (the verb `uncache`, `uncaching.py`), or in another one (the command, `nbdtarget.porcelain.uncache`). Each
table takes the place of the one before it, while clients' requests wait a moment.

    1. cleaner      the same line, but writethrough and with the policy `cleaner`: from here on the
                    number of dirty blocks only falls. `clean_now`, then wait until no block is dirty
    2. passthrough  the target refuses it while a block is dirty. Every block is invalidated, and a
                    status makes that durable
    3. linear       the origin alone

Step 2 protects what is written later. If the old cache line is used again, for example from an old
file, it must find an empty cache, and not blocks that are older than those of the origin.

Before each step the origin is flushed. If the flush fails, nothing is changed: the cache goes on with its table,
which still serves what the origin cannot take, and the error says so. Taking the step would
suspend a table that cannot be committed, and the next table would be read-only.

The job can end at any point without losing anything, and another one continues from there: each of the
three tables serves clients what they wrote. When a
table is refused at the last moment, the server goes on with the one before it. `stop` takes effect
while the job waits for dirty blocks. It does not take effect between the load of a table and its resume, nor in the last
two steps, which are short.

Values that messages have set (`migration_threshold`, `migration_rate`) go into the
new line. The threshold is raised to eight blocks, because with a smaller one no block can be written back.

A cache or metadata in memory would be empty in each new table. Such a cache is swapped for `linear` at
once if it is not writeback, because then the origin has everything. Otherwise it is refused, as is an
origin in memory.
"""

import asyncio
import errno as errnos
from contextlib import suppress
from typing import Final, Protocol, TypeVar

import msgspec

from nbdtarget.common.clock import monotonic_ns, timeout
from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.words import join_words, split_words
from nbdtarget.control import messages as m
from nbdtarget.devices.resolve import is_volatile
from nbdtarget.targets.base import StatusFields, count
from nbdtarget.targets.cache.table import (
    ARGUMENTS_MIN,
    PASSTHROUGH,
    WRITEBACK,
    WRITETHROUGH,
    Options,
    parse_options,
)

__all__ = [
    "Ask",
    "CacheLine",
    "Draining",
    "UncacheError",
    "UncacheJob",
    "UncacheReporter",
]

POLL_S: Final = 0.25
STUCK_S: Final = 5.0  # when no block was written back for so long, that is reported and asked for again
CLEANER: Final = "cleaner"
THRESHOLD_BLOCKS_MIN: Final = 8
ORIGIN_S_MAX: Final = 60.0
DRAINS_MAX: Final = 3  # how often a block may be dirty again when there were none

A = TypeVar("A", bound=m.Answer)


class Ask(Protocol):
    """Carries out a verb of the control socket, also if the job is cancelled meanwhile. Raises: NbdTargetError."""

    async def __call__(
        self, verb: str, request: m.Request, answer_type: type[A]
    ) -> A: ...


class UncacheError(NbdTargetError):
    """It cannot be done, or not be ended. One line, which names the device."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name = name
        self.reason = reason

    def __str__(self) -> str:
        return f"uncache {self.name}: {self.reason}"


class Draining(msgspec.Struct, frozen=True, kw_only=True):
    """How far the writing back is.

    Args:
        errors: copies that have failed since it began.
        last_error: the last of them, if the server tells.
    """

    dirty_blocks: int
    dirty_bytes: int
    errors: int
    last_error: str | None


class UncacheReporter(Protocol):
    """Tells the user how the uncaching goes."""

    def draining(self, now: Draining) -> None:
        """These blocks must still be written back. Called now and then."""
        ...

    def stuck(self, now: Draining, for_s: float) -> None:
        """Nothing has been written back for `for_s` seconds; it is tried again and again."""
        ...

    def interrupted(self, now: Draining | None) -> None:
        """The user has stopped it: the cache stays as it is. None: nothing has been changed."""
        ...

    def uncached(self, line: "CacheLine") -> None:
        """The origin alone is the disk."""
        ...


class CacheLine(msgspec.Struct, frozen=True, kw_only=True):
    """A cache's table line, taken to pieces."""

    length: int  # sectors
    metadata: str
    cache: str
    origin: str
    block_sectors: int
    options: Options
    read_only: bool

    @property
    def is_in_memory(self) -> bool:
        """Whether another table would find another cache, or other metadata."""
        return any(map(is_volatile, (self.metadata, self.cache)))

    def table_of(self, mode: str, fields: StatusFields) -> str:
        """The line for `mode` with the policy `cleaner`, and what messages have changed."""
        options = self.options
        features = [mode]
        for word, there in (
            ("metadata2", options.metadata2),
            ("no_discard_passdown", not options.discard_passdown),
            ("dirty_log", options.dirty_log),
            ("sorted_writeback", options.sorted_writeback),
        ):
            features += [word] if there else []
        threshold = count(fields, "migration_threshold_sectors")
        threshold = max(threshold, THRESHOLD_BLOCKS_MIN * self.block_sectors)
        core = ["migration_threshold", str(threshold)]
        if rate := count(fields, "migration_rate_bytes_per_s"):
            core += ["migration_rate", str(rate)]
        words = [self.metadata, self.cache, self.origin, str(self.block_sectors)]
        words += [str(len(features)), *features, CLEANER, str(len(core)), *core]
        return f"0 {self.length} cache {join_words(words)}"

    @property
    def linear(self) -> str:
        return f"0 {self.length} linear {join_words([self.origin])} 0"


class UncacheJob:
    """Uncaches one mapped device of a server. See the module head."""

    def __init__(self, name: str, ask: Ask, reporter: UncacheReporter) -> None:
        self._name = name
        self._ask = ask
        self._reporter = reporter
        self._stop = asyncio.Event()
        self._now: Draining | None = None
        self._errors_before = 0

    def stop(self) -> None:
        """Stop as soon as that leaves nothing half done: the cache stays, as the module head says."""
        self._stop.set()

    async def run(self) -> bool:
        """Do the job; returns whether it is done: False if it was stopped. Raises: NbdTargetError."""
        line = await self._look()
        if line.is_in_memory:
            await self._check_origin_has_all(line)
        elif not await self._empty(line):
            self._reporter.interrupted(self._now)
            return False
        await self._swap(line, line.linear)
        self._reporter.uncached(line)
        return True

    # ---- the steps ----

    async def _look(self) -> CacheLine:
        """Look at the device. Refuse anything but a table that is one cache."""
        try:
            infos = await self._ask("info", m.Info((self._name,)), m.InfoAnswer)
        except TableError as error:
            if error.errno == errnos.ENXIO:
                raise self._refused("Device does not exist") from error
            raise
        tables = await self._ask("table", m.Table((self._name,)), m.LinesAnswer)
        (info,), (table,) = infos.devices, tables.devices
        types = [line.type for line in table.lines]
        if "cache" not in types:
            what = f"its table is {', '.join(types)}" if types else "it has no table"
            raise self._refused(f"is not a cache: {what}")
        if len(types) > 1:
            raise self._refused(
                "the cache is not the only target of its table, which is"
                f" {', '.join(types)}; uncache works on a table of one line"
            )
        if info.state != "ACTIVE":
            raise self._refused("is suspended: resume it first")
        if info.inactive:
            raise self._refused("has an inactive table: resume or clear it first")
        (line,) = table.lines
        words = split_words(line.params)
        if len(words) > 2 and is_volatile(words[2]):
            raise self._refused("its origin is in memory, and is lost with its table")
        if line.start != 0 or len(words) < ARGUMENTS_MIN:
            raise self._refused(f"its table line cannot be read: {line.params}")
        return CacheLine(
            length=line.length,
            metadata=words[0],
            cache=words[1],
            origin=words[2],
            block_sectors=int(words[3]),
            options=parse_options(words[4:]),
            read_only=info.read_only,
        )

    async def _check_origin_has_all(self, line: CacheLine) -> None:
        fields = await self._fields()
        if line.options.mode == WRITEBACK or count(fields, "dirty_blocks"):
            raise self._refused(
                "its cache or metadata is in memory, and is lost with its table: dirty blocks"
                " would be lost"
            )

    async def _empty(self, line: CacheLine) -> bool:
        """Empty the cache, durably. False: the user has stopped it."""
        fields = await self._fields()
        self._errors_before = _errors(fields)
        is_passed_through = line.options.mode == PASSTHROUGH
        for _ in range(DRAINS_MAX):
            if is_passed_through:
                await self._invalidate()
                return True
            if not await self._drain(line, fields):
                return False
            is_passed_through = await self._pass_through(line, fields)
        raise self._refused(
            f"blocks became dirty again each time that all were written back ({DRAINS_MAX} times):"
            " look for errors of the origin. The cache stays in writethrough mode, with the policy"
            " cleaner"
        )

    async def _drain(self, line: CacheLine, fields: StatusFields) -> bool:
        """Have every dirty block written back. False: the user has stopped it."""
        if self._stop.is_set():
            return False
        wanted = line.table_of(WRITETHROUGH, fields)
        if await self._table() != wanted:
            await self._swap(line, wanted)
            self._errors_before = 0  # the new table counts its own
        await self._ask_message("clean_now")
        progress = _Progress()
        while True:
            now = self._draining(await self._fields())
            stuck_s = progress.stuck_s(now.dirty_blocks)
            if stuck_s is None:
                self._reporter.draining(now)
            else:
                self._reporter.stuck(now, stuck_s)
                await self._ask_message("clean_now")
            if not now.dirty_blocks:
                return True
            if self._stop.is_set():
                return False
            await self._pause()

    async def _pass_through(self, line: CacheLine, fields: StatusFields) -> bool:
        """Swap in the passthrough table. False: a block is dirty, and the old table is back."""
        await self._check_origin(line)
        await self._load(line, line.table_of(PASSTHROUGH, fields))
        try:
            await self._resume()
        except TableError as error:
            if error.errno != errnos.EBUSY:
                raise
            return False
        return True

    async def _invalidate(self) -> None:
        """Remove every block from the cache, durably. In passthrough mode none can come back."""
        total = count(await self._fields(), "cache_blocks_total")
        await self._ask_message("invalidate_cblocks", f"0-{total}")
        fields = await self._fields(commit=True)
        nr_left = count(fields, "cache_blocks_used")
        if nr_left:
            raise self._refused(f"{nr_left} blocks could not be invalidated")

    # ---- one table for another ----

    async def _swap(self, line: CacheLine, table: str) -> None:
        """Load and resume `table`; the old table stays if that is refused. Raises: TableError."""
        await self._check_origin(line)
        await self._load(line, table)
        await self._resume()

    async def _check_origin(self, line: CacheLine) -> None:
        """Flush the origin. Raises: UncacheError: the flush fails; nothing has been changed."""
        try:
            async with timeout(ORIGIN_S_MAX):
                await self._ask_message("flush_origin")
        except TimeoutError:
            raise self._refused(
                f"the origin has not answered a flush for {ORIGIN_S_MAX:g} s: nothing has"
                f" been changed, and the cache goes on. Run this command again when"
                f" {line.origin} answers"
            ) from None
        except TableError as error:
            raise self._refused(
                f"a flush of the origin fails ({error}): nothing has been changed, and the"
                f" cache goes on serving. Run this command again when {line.origin} works again"
            ) from error

    async def _resume(self) -> None:
        try:
            await self._ask("resume", m.Resume(self._name), m.Done)
        except TableError as refusal:
            # The table before it is live: the server has put it back, or has never swapped it.
            with suppress(NbdTargetError):
                await self._ask("clear", m.Clear(self._name), m.Done)
            if refusal.errno == errnos.ETIMEDOUT:
                raise self._refused(
                    f"{refusal.reason}; the dirty blocks are still in the cache. Run this command"
                    " again when the device answers"
                ) from refusal
            raise

    async def _load(self, line: CacheLine, table: str) -> None:
        # Keep the disks open that are served now: their names may mean other disks by now.
        request = m.Load(self._name, table, line.read_only, keep_open=True)
        await self._ask("load", request, m.Done)

    # ---- questions ----

    async def _table(self) -> str:
        answer = await self._ask("table", m.Table((self._name,)), m.LinesAnswer)
        return "\n".join(
            f"{line.start} {line.length} {line.type} {line.params}"
            for line in answer.devices[0].lines
        )

    async def _fields(self, *, commit: bool = False) -> StatusFields:
        """Return the status of the cache by name.

        Raises: UncacheError: the device is not a cache any more, or the cache is read-only.
        """
        request = m.Status((self._name,), None, not commit)
        answer = await self._ask("status", request, m.LinesAnswer)
        lines = answer.devices[0].lines
        if [line.type for line in lines] != ["cache"]:
            raise self._refused("another table was loaded meanwhile")
        fields = lines[0].fields
        if fields.get("mode") != "rw":
            reason = fields.get("last_error") or "a commit has failed"
            raise self._refused(
                f"the cache is read-only ({reason}), and is left as it is. When its disks work again,"
                " load its table again (load, then resume) or restart its server, and run this"
                " command again"
            )
        return fields

    async def _ask_message(self, *words: str) -> None:
        await self._ask("message", m.Message(self._name, 0, words), m.MessageAnswer)

    def _refused(self, reason: str) -> UncacheError:
        return UncacheError(self._name, reason)

    # ---- the user ----

    def _draining(self, fields: StatusFields) -> Draining:
        last_error = fields.get("last_error")
        self._now = Draining(
            dirty_blocks=count(fields, "dirty_blocks"),
            dirty_bytes=count(fields, "dirty_bytes"),
            errors=_errors(fields) - self._errors_before,
            last_error=last_error if isinstance(last_error, str) else None,
        )
        return self._now

    async def _pause(self) -> None:
        with suppress(TimeoutError):
            async with timeout(POLL_S):
                await self._stop.wait()


class _Progress:
    """Whether the number of dirty blocks falls."""

    def __init__(self) -> None:
        self._least: int | None = None
        self._since_ns = 0
        self._said_ns = 0

    def stuck_s(self, nr_dirty: int) -> float | None:
        """Return for how long it has not fallen, if that is long and was not just reported."""
        now_ns = monotonic_ns()
        if self._least is None or nr_dirty < self._least:
            self._least = nr_dirty
            self._since_ns = self._said_ns = now_ns
        if now_ns - self._said_ns < STUCK_S * 1e9:
            return None
        self._said_ns = now_ns
        return (now_ns - self._since_ns) / 1e9


def _errors(fields: StatusFields) -> int:
    value = fields.get("errors", 0)
    assert isinstance(value, int)
    return value
