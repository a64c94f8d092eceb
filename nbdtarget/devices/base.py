# SPDX-License-Identifier: Apache-2.0
"""`Device`: the interface of everything that a target stands on.

Files, memory, NBD servers, mapped devices and the crash devices of the test suite implement it.

There are two ways in, for the same I/O:

- `submit(bio)`: synchronous, for the way of a client's request. It must not block: what
  cannot be done at once owns the bio, goes to a worker thread or a socket, and ends later
  **on the event loop's thread**.
- coroutines `read`, `write`, `flush`, …: readable, for metadata, copies and set-up. Here
  they are built on `submit`; a device may have a better way.

Order. Bios in flight at the same time may be carried out in any order. A FLUSH covers every
write that had ended when the FLUSH was submitted.

Durability. An ended WRITE, WRITE_ZEROES or DISCARD survives a power cut only after a later
FLUSH has ended with 0, or if it carried FUA itself. Once a flush (or FUA write) has failed, a
device **latches**: the kernel may have dropped the dirty pages, so a later flush that
"succeeds" would prove nothing. A latched device fails each FLUSH and FUA with EIO until it is
opened again. A DISCARD promises nothing: one that fails, fails alone.

Extents. `extents` says where a device has data and where zeroes; `context_extents` says what
else it knows about its ranges, under a name in `contexts` (a clone: "hydration"), with flags
that the device defines for its name. Flags 0 always mean "nothing special here, as on any
plain disk". A device that does not know the name answers 0 for the whole range, so a stack can be asked
whatever stands in it now. Both may answer for **less** than was asked, when the rest would
take too long to find or too much room to tell; the caller asks again from there for the rest.

Context: everything here runs on the event loop's thread.
"""

import asyncio
import errno as errnos
from math import lcm
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdtarget.bio import (
    FUA,
    NO_UNMAP,
    OP_CACHE,
    OP_DISCARD,
    OP_FLUSH,
    OP_NAMES,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    Bio,
)
from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.bulk_streams import BulkStream, BulkWriter
from nbdtarget.devices.health import Health
from nbdtarget.devices.ranged.traffic import Traffic
from nbdtarget.devices.workers import WorkerPool
from nbdtarget_metadata.disks import Evidence, Mark

if TYPE_CHECKING:
    from nbdtarget.fast.compiled import FastFile, Route

__all__ = [
    "EXTENTS_MAX",
    "EXTENT_DATA",
    "EXTENT_HOLE",
    "EXTENT_ZERO",
    "Device",
    "Extent",
    "QueueLimits",
    "append_extent",
]

EXTENTS_MAX: Final = (
    4096  # one answer has hardly more; then it is for less than was asked
)

EXTENT_DATA = 0
EXTENT_HOLE = 1  # not allocated: writing there may fail with ENOSPC
EXTENT_ZERO = 2  # reads as zeroes


class QueueLimits(NamedTuple):
    """The sizes of requests that suit a device, in bytes; it takes any. 0: no preference.

    Attributes:
        logical_block_size: what a region size must be a multiple of.
        io_min: smaller requests cost more than their bytes.
        io_opt: requests of this size, or multiples, are the best.
        discard_granularity: a DISCARD does nothing to less than this.
    """

    logical_block_size: int = 512
    io_min: int = 0
    io_opt: int = 0
    discard_granularity: int = 0

    def stacked(self, other: "QueueLimits") -> "QueueLimits":
        """Return the limits that suit both. Source: blk_stack_limits."""
        return QueueLimits(
            max(self.logical_block_size, other.logical_block_size),
            max(self.io_min, other.io_min),
            lcm(self.io_opt, other.io_opt) or self.io_opt or other.io_opt,
            max(self.discard_granularity, other.discard_granularity),
        )


class Extent(NamedTuple):
    """A run of bytes in one state. `extents`: EXTENT_HOLE and EXTENT_ZERO, or'ed."""

    length: int
    flags: int


def append_extent(found: list[Extent], length: int, flags: int) -> None:
    """Append a run, or lengthen the last one if it is in the same state."""
    if found and found[-1].flags == flags:
        found[-1] = Extent(found[-1].length + length, flags)
    else:
        found.append(Extent(length, flags))


class Device:
    """A block device. Subclasses implement `submit` and `close`.

    Attributes:
        name: as the user wrote it; it stands in table lines, status and errors.
        secret_name: the same with the secrets of its URL, for lines that are loaded again; never to be shown. Empty:
            there are none.
        bare_name: the same without `raw:`.
        size: bytes. Changes only when a table is loaded, see `measure`.
        read_only: writes end with EPERM.
        health: what has gone wrong with it, see `nbdtarget.devices.health`.
        logical_block_size, io_min, io_opt, discard_granularity: see `QueueLimits`; a device
            takes requests of any size and alignment all the same, and FUA.
        fails_inline: a READ may end with an error inside `submit`, while `health` says that all is
            well. Without it, an error comes later, so there was time to push a hook.
        can_discard, can_write_zeroes, can_fast_zero: without `can_write_zeroes`, a
            WRITE_ZEROES still works, by writing zeroes; without `can_discard`, a DISCARD ends
            with 0 and does nothing. FAST_ZERO without `can_fast_zero` ends with ENOTSUP.
        traffic: what a remote disk has cost so far; None: it is none.
        is_forward_only: it is read from the front to the end, and a step back costs all that lies before: copy it in order.
        has_lanes: what `submit_ahead` reads does not keep clients' reads waiting, so a background copy need not rest for them.
        hides_zeroes: `extents` does not tell where it has nothing but zeroes: a copy looks for them in what it has read.
        rotational: what `is_rotational` says, of a device that does not ask others.
        may_be_container: its bytes come from a file or a server, where something else than a raw disk may lie by mistake.
        can_resize: `size` may be set to what `measure` says; else the disk has to be opened anew.
        changed: why the content is not what it was when the device was opened, or not what was promised then (it is damaged), in
            words; then reads fail for good, and nothing more should be copied from it. Empty: all is well, as far as is known.
        volatile_state: what is in memory only, and would be lost if another process opened the device in our place.
    """

    logical_block_size: int = 512
    io_min: int = 0
    io_opt: int = 0
    discard_granularity: int = 0
    fails_inline: bool = False
    can_discard: bool = False
    can_write_zeroes: bool = False
    can_fast_zero: bool = False
    rotational: bool = False
    has_lanes: bool = False
    hides_zeroes: bool = False
    is_forward_only: bool = False
    traffic: Traffic | None = None
    may_be_container: bool = False
    _pools: tuple[WorkerPool, ...] = ()
    can_resize: bool = True
    changed: str = ""
    secret_name: str = ""
    volatile_state: str = ""

    def __init__(self, name: str, size: int, *, read_only: bool = False) -> None:
        self.name = self.bare_name = name
        self.size = size
        self.read_only = read_only
        self.health = Health()

    @property
    def exact_size(self) -> int:
        """Bytes of what lies below, where `size` is rounded up to whole sectors."""
        return self.size

    @property
    def loadable_name(self) -> str:
        """The name by which a table opens this device: with its secrets, so not to be shown."""
        return self.secret_name or self.name

    @property
    def is_rotational(self) -> bool:
        """Whether the disk has to seek, as the kernel's `queue/rotational` says."""
        return self.rotational

    @property
    def losses(self) -> int:
        """How often writes that had ended, and were not flushed, may have been lost: never fewer
        than before. A stacked device counts what was lost below it while it stood there."""
        return self.health.losses

    @property
    def limits(self) -> QueueLimits:
        return QueueLimits(
            self.logical_block_size, self.io_min, self.io_opt, self.discard_granularity
        )

    async def reopened(self, name: str, *, read_only: bool) -> "Device | None":
        """Open the same disk once more, as `name`, because this device is latched or lost.

        None: opening it by its name is all that it takes. The device itself: it is usable again.
        Raises: ResolveError; then this device is as before.
        """
        return None

    def reopening_undone(self) -> None:
        """The other device that `reopened` has returned is closed, and this one goes on as before."""

    async def check_again(self) -> None:
        """Look whether the disk could be opened once more by its name after it has been closed. It is not disturbed.

        Raises: ResolveError: it is known that it could not, or that the name would lead to another disk.
        """

    def note_bulk_read(self, nr_requests: int, nr_bytes: int) -> None:
        """A bulk copy has read so much from streams that the device has lent. Context: the event loop."""

    def give_up_reads(self) -> None:
        """End what is being read with EIO, if it may take forever: the server is to stop.

        Nothing is lost by that. Later reads may hang again, or fail for a few seconds.
        """

    def submit(self, bio: Bio) -> None:
        """Start `bio`; it ends here or later. Never blocks, never raises for an I/O error."""
        raise NotImplementedError

    def submit_background(self, bio: Bio) -> None:
        """As `submit`, for a bio that no client waits for: it holds the loop up less, and takes longer."""
        self.submit(bio)

    def submit_behind(self, bio: Bio) -> None:
        """As `submit`, for a WRITE of which `write_behind` is going to be told."""
        self.submit(bio)

    def submit_ahead(self, bio: Bio) -> None:
        """As `submit`, for a READ of a background copy, which must not stand in the way of clients' reads."""
        self.submit(bio)

    def lend_streams(self) -> list[BulkStream]:
        """Lend what threads of a bulk copy may read with: see `nbdtarget.devices.bulk`. None: it is read by bios."""
        return []

    def maybe_bulk_writer(self) -> BulkWriter | None:
        """Return what threads of a bulk copy may write with, or None: it is written by bios."""
        return None

    def maybe_route(self) -> "Route | None":
        """Return where plain READs and WRITEs may go on the compiled fast path until other Python code runs.

        None: nowhere, they have to be submitted.
        """
        return None

    def maybe_fast_file(self) -> "FastFile | None":
        """Return the open file that all bytes of this device lie in, for the compiled fast path.

        None if there is no such file, or no compiled fast path: then every bio is submitted.
        """
        return None

    def set_size(self, size: int) -> None:
        """From now on this is the size; `measure` has said so."""
        self.size = size

    async def measure(self) -> int:
        """Ask what lies below how large it is now, and return that; `size` stays what it was.

        Raises: OSError, ResolveError.
        """
        return self.size

    async def use_name(self, name: str) -> None:
        """Reach the same disk by another name from now on, for example under a new signature of its URL.

        Raises: ResolveError: it cannot be reached so, or is another disk; then nothing has changed.
        """
        raise ResolveError(self.name, "is not reached by a URL")

    async def close(self) -> None:
        """Release what is open. The caller has drained all I/O, but for reads that it has given
        up; nothing is flushed here."""
        raise NotImplementedError

    async def readinto(self, offset: int, buffer: memoryview) -> None:
        """Fill `buffer` from `offset`. Raises: DeviceError."""
        await self._io(Bio(OP_READ, offset, len(buffer), buffer, 0, _ended))

    async def read(self, offset: int, length: int) -> memoryview:
        """Return `length` bytes from `offset`. Raises: DeviceError."""
        buffer = memoryview(bytearray(length))
        await self.readinto(offset, buffer)
        return buffer

    async def write(
        self, offset: int, data: bytes | bytearray | memoryview, *, fua: bool = False
    ) -> None:
        """Write `data`, which must not change until this returns.

        Raises: DeviceError.
        Durable: with `fua`, the data; else nothing until a flush.
        """
        view = memoryview(data)
        await self._io(
            Bio(OP_WRITE, offset, len(view), view, FUA if fua else 0, _ended)
        )

    async def flush(self) -> None:
        """Flush. Raises: DeviceError.

        Durable: every write that had ended when this was called.
        """
        await self._io(Bio(OP_FLUSH, 0, 0, None, 0, _ended))

    async def discard(self, offset: int, length: int) -> None:
        """Give the range up: what it reads afterwards is undefined. Raises: DeviceError."""
        await self._io(Bio(OP_DISCARD, offset, length, None, 0, _ended))

    async def write_zeroes(
        self, offset: int, length: int, *, fua: bool = False, no_unmap: bool = False
    ) -> None:
        """Make the range read as zeroes. Raises: DeviceError. Durable: as `write`."""
        flags = (FUA if fua else 0) | (NO_UNMAP if no_unmap else 0)
        await self._io(Bio(OP_WRITE_ZEROES, offset, length, None, flags, _ended))

    @property
    def nr_in_flight(self) -> int:
        """How many requests have begun and not ended, where the device knows; for messages."""
        return sum(pool.nr_jobs for pool in self._pools)

    def start_writeback(self) -> None:
        """Hint that much has been written, and that a flush will come: begin to write it back.

        Never waits; promises nothing.
        """

    async def write_behind(self, ranges: list[tuple[int, int]]) -> None:
        """Hint that the data written to `ranges` (begin, end) will not be needed soon.

        Begin to write these ranges back; wait until those of an earlier call have been written, and drop the earlier ones from
        the page cache. Without ranges, wait for those of all calls before. One call at a time. Promises nothing.
        """

    async def prefetch(self, offset: int, length: int) -> None:
        """Hint that the range will be read soon."""
        await self._io(Bio(OP_CACHE, offset, length, None, 0, _ended))

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """Describe the range: at least one extent, none of no bytes, together at most `length`.

        A device that does not know says data, which is always a safe answer.
        Raises: DeviceError.
        """
        return [Extent(length, EXTENT_DATA)]

    @property
    def contexts(self) -> tuple[str, ...]:
        """Return the names of the contexts that `context_extents` knows now."""
        return ()

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        """As `extents`, for what goes by the name of `context`; flags 0 if nothing does.

        Raises: DeviceError.
        """
        return [Extent(length, 0)]

    async def identify(self, role: str) -> Evidence:
        """Tell what this is (`nbdtarget.devices.identity`); `mark` is the one for `role`."""
        return Evidence("", self.name, self.size)

    async def mark(self, role: str, mark: Mark) -> bool:
        """Carry a mark; False: it cannot, or not now. Never harms what is stored.

        Durable: the mark, if this returns True.
        """
        return False

    async def sync_attributes(self) -> bool:
        """Make what `identify` tells durable, the time of the last change included.

        False: it cannot be said. Durable: that, if this returns True.
        """
        return False

    async def _io(self, bio: Bio) -> None:
        loop = asyncio.get_running_loop()
        done: asyncio.Future[None] | None = None

        def ended(_: Bio) -> None:
            if done is not None and not done.cancelled():
                done.set_result(None)

        bio.endio = ended
        self.submit(bio)
        if bio.status < 0:
            done = loop.create_future()
            await done
        if bio.status:
            raise DeviceError(
                bio.status, self.name, OP_NAMES[bio.op], bio.offset, bio.length
            )

    def check_bounds(self, bio: Bio) -> int:
        """Return 0, or the errno for a bio that this device must refuse unserved."""
        if bio.op in (OP_READ, OP_CACHE):
            return errnos.EINVAL if bio.offset + bio.length > self.size else 0
        if bio.op == OP_FLUSH:
            return 0
        if self.read_only:
            return errnos.EPERM
        if bio.offset + bio.length > self.size:
            return errnos.EINVAL if bio.op == OP_DISCARD else errnos.ENOSPC
        return 0


def _ended(_: Bio) -> None:
    raise AssertionError("replaced by Device._io")
