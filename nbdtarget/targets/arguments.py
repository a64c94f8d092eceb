# SPDX-License-Identifier: Apache-2.0
"""Words of table lines that several targets share: numbers, groups of words, and runs of a device.

The kernel reads numbers in two ways, and so do we: `sscanf` takes digits only, `kstrtouint` and its likes take a
leading plus sign too. A number that the kernel would let wrap around is refused.

One device may stand several times in one of these lines (two stripes of one disk, a delay with
its own flush delay): it is opened once for each name, as `Runs` does.
"""

from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

from nbdtarget.common.errors import ConstructorError, ResolveError
from nbdtarget.common.numbers import maybe_number
from nbdtarget.common.units import SECTOR, parse_size
from nbdtarget.common.words import quote_word
from nbdtarget.devices.base import Device
from nbdtarget.targets.base import TargetContext

__all__ = [
    "RATES",
    "SECTORS_MAX",
    "UINT32_MAX",
    "UINT64_MAX",
    "Run",
    "Runs",
    "close_all",
    "parse_rate",
    "parse_sectors",
    "parse_uint",
    "parse_uint32",
    "read_argument",
    "read_group",
]

SECTORS_MAX: Final = (1 << 63) // SECTOR
UINT32_MAX: Final = (1 << 32) - 1
UINT64_MAX: Final = (1 << 64) - 1
RATES: Final = "a number of bytes a second, for example 10M; 0 sets no bound"


def parse_uint(word: str, number_max: int, *, plus: bool = False) -> int | None:
    """Parse a decimal number; None if `word` is none, or if the number is larger than the max.

    Args: plus: the number may have a plus sign, as for `kstrtouint`; otherwise it is digits only, as for `sscanf`.
    """
    digits = word.removeprefix("+") if plus else word
    return maybe_number(digits, number_max)


def parse_sectors(word: str) -> int | None:
    """Parse an offset in sectors, as `sscanf("%llu")` does."""
    return parse_uint(word, SECTORS_MAX)


def parse_uint32(word: str) -> int | None:
    """Parse an unsigned 32-bit number, as `kstrtouint` does."""
    return parse_uint(word, UINT32_MAX, plus=True)


def parse_rate(word: str) -> int | None:
    """Parse bytes a second that are written as a size (10M); None if they are not."""
    try:
        return parse_size(word)
    except ValueError:
        return None


def read_argument(
    word: str, number_min: int, number_max: int, reason: str, target: str
) -> int:
    """Parse a number within bounds, as `dm_read_arg` does. Raises: ConstructorError."""
    number = parse_uint(word, number_max)
    if number is None or number < number_min:
        raise ConstructorError(reason, target=target)
    return number


def read_group(
    words: Sequence[str], count_max: int, reason: str, target: str
) -> tuple[Sequence[str], Sequence[str]]:
    """Split `words` into the group that the first word counts, and what follows it.

    As `dm_read_arg_group` does. Raises: ConstructorError: with `reason`, if the count is wrong or missing.
    """
    if not words:
        raise ConstructorError(reason, target=target)
    count = read_argument(words[0], 0, min(count_max, len(words) - 1), reason, target)
    return words[1 : 1 + count], words[1 + count :]


class Run(NamedTuple):
    """Where on a device something begins. `start` is bytes."""

    device: Device
    start: int

    @property
    def words(self) -> str:
        """`<dev> <offset>`, as in a table line."""
        return f"{quote_word(self.device.loadable_name)} {self.start // SECTOR}"


class Runs:
    """The devices that one constructor opens; it closes all of them again if the constructor refuses.

        async with Runs(ctx, "delay") as runs:
            run = await runs.open(name, start_sectors, ctx.length)
            …
            return DelayTarget(ctx, run)

    Whether every run fits is looked at when the block is left, after all words, as in the kernel.
    Leaving it by an exception closes the devices, leaving it otherwise keeps them open.
    Raises: ConstructorError, on the way out: a run does not fit.
    """

    def __init__(self, ctx: TargetContext, target: str) -> None:
        self._ctx = ctx
        self._target = target
        self._opened: dict[str, Device] = {}
        self._alone: list[Device] = []
        self._runs: list[tuple[str, Run, int]] = []

    async def __aenter__(self) -> "Runs":
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: object, trace: object
    ) -> None:
        misfit = self._maybe_misfit() if kind is None else None
        if kind is not None or misfit is not None:
            await close_all(self._ctx, (*self._opened.values(), *self._alone))
        if misfit is not None:
            raise misfit

    def _maybe_misfit(self) -> ConstructorError | None:
        for name, (device, start), length in self._runs:
            if start + length > device.size:
                # The text of dm_table.c, which checks this for every target's devices.
                return ConstructorError(
                    f"{name} too small for target: start={start // SECTOR}, "
                    f"len={length // SECTOR}, dev_size={device.size // SECTOR}",
                    target=self._target,
                )
        return None

    async def open(
        self,
        name: str,
        start_sectors: int,
        length: int,
        reason: str = "Device lookup failed",
        *,
        shared: bool = True,
        read_only: bool | None = None,
    ) -> Run:
        """Open the device called `name`, once, for `length` bytes from `start_sectors` on.

        Args: shared: as of `TargetContext.open_device`. read_only: None: as the table is.
        Raises: ConstructorError: with `reason` and why.
        """
        device = self._opened.get(name)
        if device is None:
            read_only = self._ctx.read_only if read_only is None else read_only
            device = await self._open(name, reason, read_only=read_only, shared=shared)
            self._opened[name] = device
        run = Run(device, start_sectors * SECTOR)
        self._runs.append((name, run, length))
        return run

    async def open_alone(self, name: str, reason: str) -> Device:
        """Open a device for writing that must not stand anywhere else.

        Raises: ConstructorError: with `reason` and why.
        """
        device = await self._open(name, reason, read_only=False, shared=False)
        self._alone.append(device)
        return device

    async def _open(
        self, name: str, reason: str, *, read_only: bool, shared: bool
    ) -> Device:
        try:
            return await self._ctx.open_device(name, read_only=read_only, shared=shared)
        except ResolveError as error:
            raise ConstructorError(
                f"{reason}: {error}", error.errno, self._target
            ) from error


async def close_all(ctx: TargetContext, devices: Iterable[Device]) -> None:
    """Close each device once, however often it is named."""
    for device in dict.fromkeys(devices):
        await ctx.close_device(device)
