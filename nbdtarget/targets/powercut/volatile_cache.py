# SPDX-License-Identifier: Apache-2.0
"""A disk's volatile write cache as a data structure: what a power cut may leave of it.

Theory of operation. A disk ends a WRITE when its cache has the data. The cache keeps each
such write as a `PendingWrite`, oldest first: whole 512-byte sectors, each with the value that
it had after the write. The **medium** under it (a bytearray, a file, another device) belongs to
the caller, who asks and does the I/O:

    WRITE          `write`: visible through `overlay`, at risk. WRITE_ZEROES, and a DISCARD,
                   are writes of what their range reads as afterwards
    READ           the medium, then `overlay` on top
    FLUSH          `mark` when it is submitted: everything that has ended by then is covered.
                   Later, `covered(mark)` to the medium; when it is durable there, `forget(mark)`
    WRITE + FUA    to the medium, durably, then `supersede`: an older pending value of those
                   sectors can no longer come back. (Or `write`, then what a FLUSH does)
    power cut      `survivors` of the pending writes reach the medium; then `clear`

Between `covered` and `forget` the writes stay pending: they are still read, and a power cut
may still lose them, whatever part of them the medium has already. The caller does not change a
covered sector on the medium meanwhile in any other way (FUA), or the older value lands on
top of the newer.

What a power cut leaves. Writes reach the medium in any order, whole, not at all, or **torn** at
a border: 512 bytes, or 4096 on a disk that writes 4 KiB at a time (then the sectors of one
aligned 4 KiB block live or die together). A sector holds its value on the medium or
the one that it had after one of the pending writes, never a mixture of two.

A write of part of a sector is the caller's to complete: it reads the sector first, through
`overlay`. Sectors are numbered from the start of the device. No I/O, no clock, no chance
but by seed.
"""

import enum
import random
from collections.abc import Iterator, Sequence
from typing import Final

from nbdtarget.common.units import SECTOR

__all__ = [
    "BORDERS",
    "SAMPLES_DEFAULT",
    "SUBSETS_MAX",
    "Fate",
    "PendingWrite",
    "Sectors",
    "VolatileCache",
    "covering",
    "lay_over",
    "possibilities",
    "split_sectors",
    "survivors",
]

BORDERS: Final = (512, 4096)  # bytes at which a write may tear
SUBSETS_MAX: Final = 8  # pending writes up to which `possibilities` tries every subset
SAMPLES_DEFAULT: Final = 200  # possibilities by seed, beyond those

Sectors = dict[int, bytes]  # sector number -> its 512 bytes

_ZEROES: Final = bytes(SECTOR)


class Fate(enum.Enum):
    """The ways in which a power cut treats pending writes."""

    KEEP = "keep"  # all reach the medium
    DROP = "drop"  # none does
    TEAR = "tear"  # of each, some part, in any order
    MIXED = "mixed"  # each is kept, dropped or torn by itself, in any order


class PendingWrite:
    """One write that no flush has covered yet.

    Attributes:
        seq: counts up; what a mark is compared with.
        sectors: those that nothing durable has superseded, in ascending order.
    """

    __slots__ = ("sectors", "seq")

    def __init__(self, seq: int, sectors: Sectors) -> None:
        self.seq = seq
        self.sectors = sectors

    def __repr__(self) -> str:
        return f"<PendingWrite {self.seq}: sectors {sorted(self.sectors)}>"


class VolatileCache:
    """The writes of one disk that a power cut may lose. See the module head.

    Attributes:
        pending: oldest first. Others only read it.
        nr_sectors: that the pending writes hold, one counted as often as it was written;
            512 bytes of memory each. The caller bounds them, by flushing in time.
    """

    def __init__(self) -> None:
        self.pending: list[PendingWrite] = []
        self.nr_sectors = 0
        self._newest: dict[
            int, PendingWrite
        ] = {}  # sector -> the write that wrote it last
        self._seq = 0

    @property
    def mark(self) -> int:
        """Return a mark for the writes that a FLUSH submitted now covers: pass it to `covered` and `forget`."""
        return self._seq

    def write(self, sectors: Sectors) -> PendingWrite:
        """Take a write that is carried out now: the values of whole sectors (`split_sectors`)."""
        assert sectors
        self._seq += 1
        write = PendingWrite(self._seq, sectors)
        self.pending.append(write)
        self._newest.update(dict.fromkeys(sectors, write))
        self.nr_sectors += len(sectors)
        return write

    def overlay(self, offset: int, buffer: bytearray | memoryview) -> None:
        """Put the pending values over `buffer`, which the medium has filled from `offset`.

        `offset` and the length of `buffer` are bytes of any alignment.
        """
        lay_over(self.newest(covering(offset, len(buffer))), offset, buffer)

    def newest(self, sectors: range) -> Sectors:
        """Return the pending values of `sectors`, where there are any: what a read must see.

        For a read that goes on while a flush brings them to the medium and forgets them.
        """
        newest = self._newest
        if not newest:
            return {}
        return {nr: newest[nr].sectors[nr] for nr in sectors if nr in newest}

    def covered(self, mark: int) -> Sectors:
        """Return what a FLUSH of `mark` must bring to the medium: the newest covered values."""
        sectors: Sectors = {}
        for write in self.pending:
            if write.seq > mark:
                break
            sectors.update(write.sectors)
        return sectors

    def forget(self, mark: int) -> None:
        """Forget the writes that `covered(mark)` returned: they are durable on the medium."""
        nr = 0
        for write in self.pending:
            if write.seq > mark:
                break
            nr += 1
            self.nr_sectors -= len(write.sectors)
            for sector in write.sectors:
                if self._newest[sector] is write:
                    del self._newest[sector]
        del self.pending[:nr]

    def supersede(self, sectors: range, mark: int | None = None) -> None:
        """The medium durably holds something newer than any pending value of `sectors`.

        With a `mark`: than any up to that; what was written since stays pending.
        """
        gone = [nr for nr in sectors if nr in self._newest]
        if not gone:
            return
        limit = self._seq if mark is None else mark
        for write in self.pending:
            if write.seq > limit:
                break
            for nr in gone:
                if write.sectors.pop(nr, None) is not None:
                    self.nr_sectors -= 1
                    if self._newest.get(nr) is write:
                        del self._newest[nr]
        self.pending = [write for write in self.pending if write.sectors]

    def clear(self) -> None:
        """The power is gone, and with it all that was pending. Marks stay comparable."""
        self.pending = []
        self._newest.clear()
        self.nr_sectors = 0


def covering(offset: int, length: int) -> range:
    """Return the numbers of the sectors that the bytes touch."""
    return range(offset // SECTOR, -(-(offset + length) // SECTOR))


def lay_over(sectors: Sectors, offset: int, buffer: bytearray | memoryview) -> None:
    """Put the values of `sectors` over `buffer`, which is filled from byte `offset` on."""
    end = offset + len(buffer)
    for nr, value in sectors.items():
        begin = nr * SECTOR
        low, high = max(begin, offset), min(begin + SECTOR, end)
        buffer[low - offset : high - offset] = value[low - begin : high - begin]


def split_sectors(first: int, data: bytes | bytearray | memoryview) -> Sectors:
    """Cut the whole sectors of `data`, the first of which is number `first`; it is copied."""
    assert len(data) % SECTOR == 0
    sectors = {}
    for nr, at in enumerate(range(0, len(data), SECTOR), first):
        value = bytes(data[at : at + SECTOR])
        sectors[nr] = (
            _ZEROES if value == _ZEROES else value
        )  # large zeroes cost no memory
    return sectors


def survivors(
    pending: Sequence[PendingWrite],
    fate: Fate = Fate.MIXED,
    seed: int = 0,
    *,
    border: int = SECTOR,
) -> Sectors:
    """Return the values that reach the medium when the power is cut now.

    `pending` is a cache's, with writes that are still under way behind it if need be. The
    same seed gives the same answer. `border`: bytes, one of BORDERS.
    """
    assert border in BORDERS
    if fate is Fate.DROP:
        return {}
    if fate is Fate.KEEP:
        return _merged(pending)
    rng = random.Random(seed)
    chosen = []
    for write in pending:
        luck = 0.5 if fate is Fate.TEAR else rng.random()
        if luck < 0.4:
            chosen.append(write)
        elif luck < 0.6:
            chosen.append(PendingWrite(write.seq, _torn(write.sectors, rng, border)))
    if rng.random() < 0.5:
        rng.shuffle(chosen)
    return _merged(chosen)


def possibilities(
    pending: Sequence[PendingWrite],
    *,
    subsets_max: int = SUBSETS_MAX,
    samples: int = SAMPLES_DEFAULT,
    seed: int = 0,
    border: int = SECTOR,
) -> Iterator[Sectors]:
    """Return what `survivors` may be, as far as can be tried.

    None, all and every prefix of the pending writes; every subset, if there are at
    most `subsets_max`; then `samples` more by seed, reordered and torn, if these can differ.
    """
    nr = len(pending)
    for end in (0, nr, *range(1, nr)):
        yield _merged(pending[:end])
    if nr <= subsets_max:
        for bits in range(1 << nr):
            yield _merged([write for at, write in enumerate(pending) if bits >> at & 1])
    if nr > subsets_max or any(len(write.sectors) > 1 for write in pending):
        for sample in range(samples):
            yield survivors(pending, Fate.MIXED, seed + sample, border=border)


def _merged(writes: Sequence[PendingWrite]) -> Sectors:
    sectors: Sectors = {}
    for write in writes:
        sectors.update(write.sectors)
    return sectors


def _torn(sectors: Sectors, rng: random.Random, border: int) -> Sectors:
    """A prefix half of the time, as disks tear; else any subset, between two borders."""
    step = border // SECTOR
    blocks = sorted({nr // step for nr in sectors})
    if rng.random() < 0.5:
        kept = set(blocks[: rng.randrange(len(blocks) + 1)])
    else:
        kept = {block for block in blocks if rng.random() < 0.5}
    return {nr: value for nr, value in sectors.items() if nr // step in kept}
