# SPDX-License-Identifier: Apache-2.0
"""One job: write the dirty blocks of a cache back to its origin, while no server has it open.

Theory of operation
===================

    1. open all three, exclusively; check the whole metadata: damage and needs_check are refused. So are
       disks that do not belong to it (`nbdtarget.targets.disks`), unless a permission admits them
    2. which blocks: after a clean shutdown the dirty ones; else all that are mapped, or with dirty_log all
       that are logged; none if the metadata says that the origin has everything
    3. copy them in the order of the origin, leg by leg, and flush the origin after each leg
    4. try what failed again, one block at a time: once in any case, then as often as the job says
    5. flush the cache device; then record, in one commit, that what was copied is clean

A dirty bit is cleared only after the origin has the data for good. The cache device is flushed, too: what
was read from it may stand in a page cache only, and after a power cut the "clean" block would be
older than the origin. A crash at any time leaves the old metadata or the new, and copying
again does no harm.

After this the dirty bits are known, also if they were not before. So it is recorded as a clean shutdown,
with the blocks that could not be copied as the dirty ones. (The kernel's tool leaves the flag as it was: after an unclean
stop everything is dirty again next time.) Hints and discards stay if a clean shutdown had recorded them.
If nothing was dirty after a clean shutdown, nothing is written at all. If the job is interrupted, the
legs that are done are recorded all the same.

Failures. A block that cannot be read fails alone. After a write or flush has failed, the origin
latches (devices/base.py): nothing that it has not flushed yet is known to be there. So it is opened again,
and the rest of the leg is written again, without the blocks that failed. If it is the flush itself that failed,
all of the leg has failed.
"""

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AsyncExitStack
from typing import Final, NamedTuple, TypeVar

import msgspec
from bitarray import bitarray
from bitarray.util import zeros

from nbdtarget.common.errors import DeviceError, NbdTargetError
from nbdtarget.common.permissions import OTHER_DISK, Permission
from nbdtarget.devices import resolve
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import FlushObserver
from nbdtarget.targets.copier import Copier, CopyError
from nbdtarget.targets.disks import (
    CACHE_ROLE,
    NR_SPREAD,
    ORIGIN_ROLE,
    DiskRecords,
    Role,
    spread_ones,
)
from nbdtarget.targets.metadata_io import run
from nbdtarget_metadata.cache.content import CacheContent, read_cache_content
from nbdtarget_metadata.cache.records import OBLOCK_SHIFT
from nbdtarget_metadata.disks import spread_offsets
from nbdtarget_metadata.errors import MetadataError
from nbdtarget_metadata.log.superblock import CLEAN_SHUTDOWN
from nbdtarget_metadata.operations import Steps
from nbdtarget_metadata.tools.cache_restore import record_written_back
from nbdtarget_metadata.tools.check import examine
from nbdtarget_metadata.tools.kinds import CACHE, find_kind

__all__ = [
    "OFFSET_ALIGNMENT",
    "FailedBlock",
    "WritebackAnswer",
    "WritebackJob",
    "write_back",
]

T = TypeVar("T")

OFFSET_ALIGNMENT: Final = 4096
# A leg is what must be written again if the origin fails in it, or if the job is interrupted.
LEG_BYTES: Final = 1 << 30
COPIES_IN_FLIGHT: Final = 8

Opener = Callable[[str, bool], Awaitable[Device]]


class WritebackJob(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command.

    Args:
        metadata, cache, origin: names of devices, as in a table line.
        cache_offset, origin_offset: bytes; where the cache's and the origin's data begin.
        retry: how often to try again what failed twice.
        update_metadata: record what was written back.
        permissions: see `nbdtarget.common.permissions`.
    """

    metadata: str
    cache: str
    origin: str
    cache_offset: int = 0
    origin_offset: int = 0
    retry: int = 0
    update_metadata: bool = True
    permissions: frozenset[Permission] = frozenset()


class FailedBlock(msgspec.Struct, frozen=True, kw_only=True):
    """A block that was not copied, and why."""

    cache_block: int
    origin_block: int
    error: str

    def __str__(self) -> str:
        return (
            f"cache block {self.cache_block}, origin block {self.origin_block}:"
            f" {self.error}"
        )


class WritebackAnswer(msgspec.Struct, frozen=True, kw_only=True):
    """The copied blocks; `recorded`: the metadata say so now. `clean_shutdown`: as it was before."""

    file: str
    nr_blocks: int
    nr_copied: int
    block_size: int
    clean_shutdown: bool
    recorded: bool
    failed: tuple[FailedBlock, ...]

    def __str__(self) -> str:
        return f"{self.nr_copied}/{self.nr_blocks} blocks successfully copied"


class Block(NamedTuple):
    """A mapped block. Blocks are in the order of the origin."""

    oblock: int
    cblock: int


async def open_named(name: str, read_only: bool) -> Device:
    """Open a device by its name. Raises: ResolveError."""
    return await resolve.open_device(name, read_only=read_only)


async def write_back(
    job: WritebackJob,
    progress: Callable[[int, int], None],
    *,
    opener: Opener = open_named,
) -> WritebackAnswer:
    """Do the job. The answer says which blocks could not be copied.

    Args: progress: called with the number of bytes that are copied, and of all bytes.
    Raises: NbdTargetError: a device or the metadata is refused, or the result cannot be recorded.
    Durable: what the answer says.
    """
    _check_offsets(job)
    async with AsyncExitStack() as opened:
        metadata = await opener(job.metadata, not job.update_metadata)
        opened.push_async_callback(metadata.close)
        content = await _read(job.metadata, metadata)
        cache = await opener(job.cache, True)
        opened.push_async_callback(cache.close)
        origin = _Origin(job.origin, opener)
        await origin.open()
        opened.push_async_callback(origin.close)
        _check_sizes(job, content, cache, origin.device)
        record_of_disks = _Record(content)
        await _check_disks(job, content, record_of_disks.of(cache, origin.device))
        copy = _Copy(job, content, cache, origin, progress)

        async def record() -> bool:
            """Record what the origin has; return whether there was anything to record."""
            if content.gives_up_mappings:
                return False  # nothing is dirty, and to call it clean would be wrong
            is_unclean = not content.flags & CLEAN_SHUTDOWN
            # Without any block copied it would say the same in other words.
            is_news = copy.copied.any() or (is_unclean and not copy.blocks)
            if not job.update_metadata or not is_news:
                return False
            await cache.flush()
            disks = record_of_disks.of(cache, origin.device)
            await disks.prepare()
            await disks.note_stop(copy.samples())
            steps = record_written_back(
                metadata.size, copy.copied, disks=record_of_disks.disks
            )
            superblock = await _run(job.metadata, metadata, steps)
            record_of_disks.generation = superblock.generation
            await disks.confirm()
            return True

        try:
            await copy.run()
        except (asyncio.CancelledError, NbdTargetError):
            await record()  # the legs that are done need not be copied again
            raise
        return WritebackAnswer(
            file=job.metadata,
            nr_blocks=len(copy.blocks),
            nr_copied=copy.copied.count(),
            block_size=content.block_size,
            clean_shutdown=bool(content.flags & CLEAN_SHUTDOWN),
            recorded=await record(),
            failed=tuple(
                FailedBlock(cache_block=cblock, origin_block=oblock, error=error)
                for (oblock, cblock), error in sorted(copy.failures.items())
            ),
        )


async def _run(name: str, device: Device, steps: Steps[T]) -> T:
    try:
        return await run(device, steps)
    except MetadataError as error:
        raise NbdTargetError(f"{name}: {error}") from error


async def _read(name: str, metadata: Device) -> CacheContent:
    """Check everything, and return what it says. Raises: NbdTargetError."""
    kind = await _run(name, metadata, find_kind(metadata.size))
    findings = await _run(
        name, metadata, examine(kind.checks, metadata.size, unused=False)
    )
    if findings.damage:
        raise NbdTargetError(
            f"{name}: {'; '.join(findings.damage)}: nothing is written back from"
            " damaged metadata; `nbdtarget metadata repair` saves what is left of it"
        )
    if kind is not CACHE:
        raise NbdTargetError(
            f"{name}: is metadata of a {kind.name}: only a cache is written back"
        )
    if findings.needs_check:
        raise NbdTargetError(
            f"{name}: is marked as needing a check: run `nbdtarget metadata check"
            f" --clear-needs-check {name}` first"
        )
    return await _run(name, metadata, read_cache_content(metadata.size))


def _check_offsets(job: WritebackJob) -> None:
    for name, offset in (("origin", job.origin_offset), ("cache", job.cache_offset)):
        if offset % OFFSET_ALIGNMENT:
            raise NbdTargetError(
                f"offset {offset} of the {name} is not a multiple of {OFFSET_ALIGNMENT}"
            )


def _check_sizes(
    job: WritebackJob, content: CacheContent, cache: Device, origin: Device
) -> None:
    cache_size = content.nr_cblocks * content.block_size
    for device, what, offset, length in (
        (cache, "a cache", job.cache_offset, cache_size),
        (origin, "an origin", job.origin_offset, content.origin_size),
    ):
        if device.exact_size < offset + length:
            behind = f" behind offset {offset}" if offset else ""
            raise NbdTargetError(
                f"{device.name}: has {max(0, device.exact_size - offset)} bytes{behind}, but"
                f" the metadata belongs to {what} of {length} bytes"
            )


class _Record:
    """The disks that the metadata has recorded, and those that it is going to record."""

    def __init__(self, content: CacheContent) -> None:
        self.uuid = content.uuid
        self.generation = content.generation
        self.disks = self.recorded_disks = content.disks

    def record_disks(self, record: bytes) -> None:
        self.disks = record

    def of(self, cache: Device, origin: Device) -> DiskRecords:
        roles = Role(CACHE_ROLE, cache), Role(ORIGIN_ROLE, origin)
        return DiskRecords("metadata writeback", self, roles, {})


async def _check_disks(
    job: WritebackJob, content: CacheContent, disks: DiskRecords
) -> None:
    """Refuse disks that do not belong to the metadata. Raises: NbdTargetError."""
    for finding in await disks.look((CACHE_ROLE, ORIGIN_ROLE)):
        if not finding.is_allowed(job.permissions):
            raise NbdTargetError(finding.refusal(job.metadata))
        if finding.changed and OTHER_DISK not in job.permissions:
            why = f"{content.dirty.count()} blocks are waiting to be written back"
            raise NbdTargetError(finding.refusal_of_change(job.metadata, why))


class _Origin:
    """The origin, which is opened again after it has latched."""

    device: Device
    _observer: FlushObserver

    def __init__(self, name: str, opener: Opener) -> None:
        self._name = name
        self._opener = opener
        self._is_open = False

    async def open(self) -> None:
        self.device = await self._opener(self._name, False)
        self._observer = FlushObserver(self.device)
        self._is_open = True

    async def flush(self) -> None:
        """Raises: DeviceError; also if the device went on after it had lost writes."""
        await self._observer.flush()

    async def reopen(self) -> None:
        """Open it again. Raises: ResolveError: it is gone, or in use by now."""
        size = self.device.size
        await self.close()
        await self.open()
        if self.device.size != size:
            raise NbdTargetError(f"{self._name}: has another size than before")

    async def close(self) -> None:
        if self._is_open:
            self._is_open = False
            await self.device.close()


class _Copy:
    """The copying.

    Attributes:
        blocks: what is to be copied, in the order of the origin.
        copied: cache blocks whose data the origin has, durably.
        failures: why others were not copied.
    """

    def __init__(
        self,
        job: WritebackJob,
        content: CacheContent,
        cache: Device,
        origin: _Origin,
        progress: Callable[[int, int], None],
    ) -> None:
        values = content.values
        self.blocks = sorted(
            Block(values[cblock] >> OBLOCK_SHIFT, cblock)
            for cblock in content.dirty.search(1)
        )
        self.copied: bitarray = zeros(content.nr_cblocks, "little")
        self.failures: dict[Block, str] = {}
        self._job = job
        self._block_size = content.block_size
        self._cache = cache
        self._origin = origin
        self._progress = progress
        self._nr_done = 0
        self._is_stopping = False

    def samples(self) -> dict[str, list[int]]:
        """Where the disks are sampled: some of what was not copied, and all over the origin."""
        rest: bitarray = zeros(len(self.copied), "little")
        for block in self.blocks:
            rest[block.cblock] = not self.copied[block.cblock]
        begin, size = self._job.cache_offset, self._block_size
        dirty = spread_ones(rest, len(rest))
        return {
            CACHE_ROLE: [begin + cblock * size for cblock in dirty],
            ORIGIN_ROLE: [*spread_offsets(self._origin.device.size, NR_SPREAD)],
        }

    async def run(self) -> None:
        """Copy all that can be copied. Raises: NbdTargetError: the origin cannot be opened again."""
        todo, width = self.blocks, COPIES_IN_FLIGHT
        for _ in range(2 + self._job.retry):
            if todo:
                self._tell()
                for leg in self._legs(todo):
                    await self._copy_leg(leg, width)
            todo, width = sorted(self.failures), 1

    def _legs(self, blocks: list[Block]) -> Iterator[list[Block]]:
        step = max(1, LEG_BYTES // self._block_size)
        for begin in range(0, len(blocks), step):
            yield blocks[begin : begin + step]

    async def _copy_leg(self, leg: list[Block], width: int) -> None:
        """Copy a leg, and flush.

        Durable: what is `copied` when this returns; the rest of the leg is in `failures`.
        """
        failures: dict[Block, CopyError] = {}
        while True:
            rest = [block for block in leg if block not in failures]
            nr_unwritten = _nr_unwritten(failures)
            await self._copy_all(rest, width, failures)
            good = [block for block in rest if block not in failures]
            try:
                await self._origin.flush()
            except DeviceError as error:
                await self._origin.reopen()
                self._nr_done -= len(good)
                if _nr_unwritten(failures) > nr_unwritten:
                    continue  # latched by a write: without that block it may succeed
                self.failures.update((block, str(error)) for block in good)
            else:
                for block in good:
                    self.copied[block.cblock] = 1
                    self.failures.pop(block, None)
            self.failures.update((block, str(each)) for block, each in failures.items())
            return

    async def _copy_all(
        self, blocks: list[Block], width: int, failures: dict[Block, CopyError]
    ) -> None:
        """Copy `blocks`, begun in their order, some at a time. Waits for all, also if cancelled."""
        copier = Copier(self._cache, self._origin.device)
        rest = iter(blocks)

        async def copy_some() -> None:
            for block in rest:
                if self._is_stopping:
                    return
                try:
                    await self._copy_block(copier, block)
                except CopyError as error:
                    failures[block] = error
                else:
                    self._nr_done += 1
                    self._tell()

        copying = asyncio.gather(*(copy_some() for _ in range(width)))
        try:
            await asyncio.shield(copying)
        except asyncio.CancelledError:
            # A device is not closed, nor a lock given up, while its I/O is in flight.
            self._is_stopping = True
            await copying
            raise

    async def _copy_block(self, copier: Copier, block: Block) -> None:
        size = self._block_size
        await copier.copy(
            self._job.cache_offset + block.cblock * size,
            size,
            self._job.origin_offset + block.oblock * size,
        )

    def _tell(self) -> None:
        size = self._block_size
        self._progress(self._nr_done * size, len(self.blocks) * size)


def _nr_unwritten(failures: dict[Block, CopyError]) -> int:
    return sum(not error.is_read for error in failures.values())
