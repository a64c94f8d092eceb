# SPDX-License-Identifier: Apache-2.0
"""The `striped` target: chunks in turn on several devices (RAID 0).

    <number of stripes> <chunk size> (<dev> <offset>)+

Theory of operation. Chunk number c of the target is chunk c // n of stripe c % n. Neither the
number of stripes nor the chunk size needs to be a power of two.

    bio                        goes
    READ, WRITE, one chunk     on, by a division: the common case
    READ, WRITE, more          cut at chunk borders; the pieces go on, PIECES_AT_ONCE_MAX in one turn
                               of the loop, since 32 MiB on 512-byte chunks are 65536 of them
    DISCARD, WRITE_ZEROES,     one bio for each stripe that has a part of it: whatever lies on one
    CACHE                      stripe lies there in one piece
    FLUSH                      to each device, once

A bio ends when its last piece has, with the first error.

Errors are counted by device. One error makes its letter D (dead) instead of A (alive) in the
status, for as long as this table lives; each of the first ERRORS_TOLD_MAX raises an event. It is
the user who decides what to do then: nothing here fails faster, or retries.
"""

import asyncio
import errno as errnos
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from nbdtarget.bio import (
    OP_CACHE,
    OP_FLUSH,
    OP_WRITE,
    Bio,
    split_bio,
)
from nbdtarget.common.errors import ConstructorError
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import join_words
from nbdtarget.devices.base import (
    EXTENTS_MAX,
    Device,
    Extent,
    QueueLimits,
    append_extent,
)
from nbdtarget.targets.arguments import (
    Run,
    Runs,
    close_all,
    parse_sectors,
    parse_uint32,
)
from nbdtarget.targets.base import (
    REMAPPED,
    SUBMITTED,
    StatusFields,
    Target,
    TargetContext,
)
from nbdtarget.targets.measured import target_attributes

__all__ = ["StripedTarget"]

ERRORS_TOLD_MAX: Final = 14  # events for one device
PIECES_AT_ONCE_MAX: Final = 64
CHUNKS_AT_ONCE_MAX: Final = 4096  # described between two turns of the loop


class StripedTarget(Target):
    """`<n> <chunk size> (<dev> <offset>)+`: sectors. Source: drivers/md/dm-stripe.c."""

    type_name = "striped"
    version = (1, 6, 0)

    def __init__(
        self, ctx: TargetContext, stripes: Sequence[Run], chunk_size: int
    ) -> None:
        """Args: chunk_size: bytes."""
        super().__init__(ctx)
        self._stripes = tuple(stripes)
        self._nr_stripes = len(stripes)
        self._chunk_size = chunk_size
        devices = [run.device for run in stripes]
        self._devices = tuple(dict.fromkeys(devices))
        self._errors = dict.fromkeys(self._devices, 0)
        self._ways = [(*run, self._counter(run.device)) for run in stripes]
        # A device that cannot discard ends a DISCARD with 0 all the same.
        self.can_discard = any(device.can_discard for device in devices)
        self.can_write_zeroes = all(device.can_write_zeroes for device in devices)
        self.can_fast_zero = all(device.can_fast_zero for device in devices)

    @classmethod
    async def ctr(cls, ctx: TargetContext, args: Sequence[str]) -> "StripedTarget":
        if len(args) < 2:
            raise _error("Not enough arguments")
        nr_stripes = parse_uint32(args[0])
        if not nr_stripes:
            raise _error("Invalid stripe count")
        chunk_sectors = parse_uint32(args[1])
        if not chunk_sectors:
            raise _error("Invalid chunk_size")
        width, rest = divmod(ctx.length // SECTOR, nr_stripes)
        if rest:
            raise _error("Target length not divisible by number of stripes")
        if width % chunk_sectors:
            raise _error("Target length not divisible by chunk size")
        if len(args) != 2 + 2 * nr_stripes:
            raise _error("Not enough destinations specified")
        reason = "Couldn't parse stripe destination"
        async with Runs(ctx, cls.type_name) as runs:
            stripes = []
            for name, word in zip(args[2::2], args[3::2], strict=True):
                start_sectors = parse_sectors(word)
                if start_sectors is None:
                    raise _error(reason)
                run = await runs.open(name, start_sectors, width * SECTOR, reason)
                stripes.append(run)
            return cls(ctx, stripes, chunk_sectors * SECTOR)

    async def dtr(self) -> None:
        await close_all(self.ctx, self._devices)
        self._ways.clear()  # its hooks refer to this object, which is freed at once without them

    def map(self, bio: Bio) -> int:
        # hot: 0.3 us for a bio within one chunk.
        op = bio.op
        if op <= OP_WRITE:
            size = self._chunk_size
            chunk, within = divmod(bio.offset - self.begin, size)
            if within + bio.length <= size:
                row, stripe = divmod(chunk, self._nr_stripes)
                bio.device, start, hook = self._ways[stripe]
                bio.offset = start + row * size + within
                bio.on_end(hook)
                return REMAPPED
            self._cut(bio, size - within)
        elif op == OP_FLUSH:
            self._fan_out(bio, [(device, 0, 0) for device in self._devices])
        else:
            at = bio.offset - self.begin
            self._fan_out(bio, self._spans(at, at + bio.length))
        return SUBMITTED

    def _cut(self, bio: Bio, first: int) -> None:
        """Cut a READ or WRITE at chunk borders; `first` is the length of the first piece."""
        full, last = divmod(bio.length - first, self._chunk_size)
        lengths = [first, *[self._chunk_size] * full]
        if last:
            lengths.append(last)
        if len(lengths) > PIECES_AT_ONCE_MAX:
            bio.own()
        pieces = split_bio(bio, lengths)
        self._submit_pieces(pieces, 0)

    def _submit_pieces(self, pieces: Sequence[Bio], at: int) -> None:
        end = at + PIECES_AT_ONCE_MAX
        for piece in pieces[at:end]:
            self.map(piece)
            piece.device.submit(piece)
        if end < len(pieces):
            asyncio.get_running_loop().call_soon(self._submit_pieces, pieces, end)

    def _spans(self, begin: int, end: int) -> list[tuple[Device, int, int]]:
        """The part of a range that each stripe has: (device, offset there, bytes)."""
        spans = []
        for stripe, (device, start) in enumerate(self._stripes):
            at, stop = self._border(begin, stripe), self._border(end, stripe)
            if at < stop:
                spans.append((device, start + at, stop - at))
        return spans

    def _border(self, offset: int, stripe: int) -> int:
        """How many bytes of `stripe` lie before `offset`."""
        chunk, within = divmod(offset, self._chunk_size)
        row, holder = divmod(chunk, self._nr_stripes)
        if stripe == holder:
            return row * self._chunk_size + within
        return (row + (stripe < holder)) * self._chunk_size

    def _fan_out(self, bio: Bio, spans: Sequence[tuple[Device, int, int]]) -> None:
        """Send a bio without a payload as one for each span; it ends with the last of them."""
        left = len(spans)
        first_error = 0

        def ended(device: Device, child: Bio) -> None:
            nonlocal left, first_error
            if child.status:
                self._count(device, child)
                first_error = first_error or child.status
            left -= 1
            if left == 0:
                bio.end(first_error)

        def endio(device: Device) -> Callable[[Bio], None]:
            return lambda child: ended(device, child)

        for device, offset, length in spans:
            child = Bio(bio.op, offset, length, None, bio.flags, endio(device))
            device.submit(child)

    def _counter(self, device: Device) -> Callable[[Bio], None]:
        def ended(bio: Bio) -> None:
            if bio.status:
                self._count(device, bio)

        return ended

    def _count(self, device: Device, bio: Bio) -> None:
        # A request that a device cannot do, and a hint that fails, say nothing of its health.
        if bio.status == errnos.ENOTSUP or bio.op == OP_CACHE:
            return
        self._errors[device] += 1
        if self._errors[device] <= ERRORS_TOLD_MAX:
            self.ctx.event()

    async def status(self, *, noflush: bool = False) -> str:
        devices = [run.device for run in self._stripes]
        names = join_words([device.name for device in devices])
        letters = "".join("D" if self._errors[device] else "A" for device in devices)
        return f"{self._nr_stripes} {names} 1 {letters}"

    def status_fields(self) -> StatusFields:
        return {
            "nr_stripes": self._nr_stripes,
            "nr_failed_stripes": sum(
                bool(self._errors[run.device]) for run in self._stripes
            ),
            "nr_errors": sum(self._errors.values()),
        }

    def table_words(self) -> str:
        runs = " ".join(run.words for run in self._stripes)
        return f"{self._nr_stripes} {self._chunk_size // SECTOR} {runs}"

    def measured_words(self) -> str:
        pairs: list[tuple[str, object]] = [
            ("stripes", self._nr_stripes),
            ("chunk_size", self._chunk_size // SECTOR),
        ]
        for nr, (device, start) in enumerate(self._stripes):
            pairs += [
                (f"stripe_{nr}_device_name", device.name),
                (f"stripe_{nr}_physical_start", start // SECTOR),
                (f"stripe_{nr}_status", "D" if self._errors[device] else "A"),
            ]
        return target_attributes(self, pairs)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        begin = offset - self.begin
        end = begin + length
        below = [
            _Cursor(await device.extents(start + at, stop - at) if at < stop else [])
            for stripe, (device, start) in enumerate(self._stripes)
            for at, stop in [(self._border(begin, stripe), self._border(end, stripe))]
        ]
        found: list[Extent] = []
        nr_chunks = 0
        while begin < end:
            chunk, within = divmod(begin, self._chunk_size)
            if not within and chunk % self._nr_stripes == 0:
                begin += self._take_rows(below, found)
                if begin >= end:
                    break
            piece = min(self._chunk_size - within, end - begin)
            if not below[chunk % self._nr_stripes].take(piece, found):
                break
            if len(found) >= EXTENTS_MAX:
                break
            begin += piece
            nr_chunks += 1
            if nr_chunks % CHUNKS_AT_ONCE_MAX == 0:
                await asyncio.sleep(0)
        return found

    def _take_rows(self, below: Sequence["_Cursor"], found: list[Extent]) -> int:
        """Describe whole rows in which all stripes are alike, and return how many bytes they have.

        Otherwise an empty disk of 16 TiB would be looked at chunk by chunk.
        """
        nr_rows = min(cursor.left for cursor in below) // self._chunk_size
        if not nr_rows or len({cursor.flags for cursor in below}) > 1:
            return 0
        for cursor in below:
            cursor.take(nr_rows * self._chunk_size, found)
        return nr_rows * self._chunk_size * self._nr_stripes

    def io_hints(self, limits: QueueLimits) -> QueueLimits:
        size = self._chunk_size
        return limits._replace(io_min=size, io_opt=size * self._nr_stripes)

    def iterate_devices(self) -> Iterable[Device]:
        return [run.device for run in self._stripes]


class _Cursor:
    """A place in the description of one stripe.

    Attributes:
        left: bytes to the end of the extent that we are in; 0: the description has ended.
        flags: that extent's.
    """

    def __init__(self, extents: Iterable[Extent]) -> None:
        self._extents = iter(extents)
        self.left, self.flags = next(self._extents, (0, 0))

    def take(self, length: int, found: list[Extent]) -> bool:
        """Move the next `length` bytes to `found`, joined to its end where they are alike.

        Returns whether the description went so far.
        """
        while length:
            if not self.left:
                return False
            part = min(length, self.left)
            append_extent(found, part, self.flags)
            self.left -= part
            length -= part
            if not self.left:
                self.left, self.flags = next(self._extents, (0, 0))
        return True


def _error(reason: str) -> ConstructorError:
    return ConstructorError(reason, target=StripedTarget.type_name)
