# SPDX-License-Identifier: Apache-2.0
"""Disks that fail, or are slow, when a test says so. `powercut` needs no class of its own: `BlockingDisk.power_cut`.

Both classes swap the table while clients stay attached: `linear` when all is well, else `flakey` or `delay` over the
same memory. Written data stays.
"""

from typing import Final

from nbdtarget.api.blocking import BlockingDisk
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.units import SECTOR
from nbdtarget.common.words import join_words

__all__ = ["FlakyDisk", "SlowDisk"]

# Up for no second, down for one: always down.
ALWAYS_DOWN: Final = "0 1"
DELAY_MS_MAX: Final = 3_600_000


class _Swapped(BlockingDisk):
    """A disk of one target over one device, from sector 0 on."""

    def __init__(self, disk: BlockingDisk) -> None:
        super().__init__(disk._disk, disk._thread)
        (below,) = self.status(noflush=True).below
        self._below = join_words([below.name])
        self._nr_sectors = self.info().size // SECTOR

    def _swap(self, target: str, words: str = "") -> None:
        self.load(f"0 {self._nr_sectors} {target} {self._below} 0 {words}".rstrip())


class FlakyDisk(_Swapped):
    """A disk that is well until `fail`."""

    def fail(
        self, *, reads: bool = True, writes: bool = True, drop_writes: bool = False
    ) -> None:
        """From now on requests fail with EIO, until `heal`.

        Args:
            reads: READs fail.
            writes: WRITEs, discards and FLUSHes fail.
            drop_writes: WRITEs and FLUSHes succeed, and do nothing: the disk lies. READs work.
        Raises: NbdTargetError: nothing is to fail.
        """
        if drop_writes:
            self._swap("flakey", f"{ALWAYS_DOWN} 1 drop_writes")
        elif reads and writes:
            self._swap("flakey", ALWAYS_DOWN)
        elif reads or writes:
            feature = "error_reads" if reads else "error_writes"
            self._swap("flakey", f"{ALWAYS_DOWN} 1 {feature}")
        else:
            raise NbdTargetError(f"{self.name}: say what is to fail: reads or writes")

    def heal(self) -> None:
        """The disk is well again, and has what was written before and what was not dropped."""
        self._swap("linear")


class SlowDisk(_Swapped):
    """A disk on which requests take as long as `set_delay` says, and what the machine takes."""

    def set_delay(
        self, read_ms: int = 0, write_ms: int | None = None, flush_ms: int | None = None
    ) -> None:
        """From now on requests wait so long; milliseconds.

        Args: write_ms: None: as reads. flush_ms: None: as writes.
        Raises: NbdTargetError: it is less than 0, or more than an hour.
        """
        write_ms = read_ms if write_ms is None else write_ms
        flush_ms = write_ms if flush_ms is None else flush_ms
        delays = (read_ms, write_ms, flush_ms)
        if not all(0 <= each <= DELAY_MS_MAX for each in delays):
            raise NbdTargetError(
                f"{self.name}: a delay must be from 0 to {DELAY_MS_MAX} ms"
            )
        below = self._below
        self._swap("delay", f"{read_ms} {below} 0 {write_ms} {below} 0 {flush_ms}")
