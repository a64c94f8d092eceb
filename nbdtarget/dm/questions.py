# SPDX-License-Identifier: Apache-2.0
"""The questions to a mapped device beside I/O: status, table lines, messages, extents, contexts.

Theory of operation. A question does not queue behind a verb. It looks at the table that is live at this moment,
and keeps the targets that it asks from being destroyed before they have answered (`Table.use`). So a suspend that
waits for a slow disk can be looked at. Extents and contexts are asked for by clients, as reads are. So they wait while the
device is suspended, and fail where a read fails.
"""

import errno as errnos
from collections.abc import Awaitable, Callable, Sequence

from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.common.units import SECTOR
from nbdtarget.devices.base import Extent
from nbdtarget.dm import core_messages
from nbdtarget.dm.access_trace import AccessTrace
from nbdtarget.dm.bio_path import BioPath, State
from nbdtarget.dm.fast_path import HasFastPath
from nbdtarget.dm.statistics import Statistics
from nbdtarget.dm.table import Ask, Table
from nbdtarget.targets.base import StatusFields, Target

__all__ = ["AnswersQuestions"]


class AnswersQuestions(HasFastPath):
    """The half of a mapped device that changes no table; `MappedDevice` sets what it looks at."""

    access_trace: AccessTrace
    deferred_remove: bool
    inactive: Table | None
    said_rotational: bool | None
    _path: BioPath

    @property
    def state(self) -> State:
        return self._path.state

    @property
    def active(self) -> Table | None:
        """The live table, if there is one."""
        return self._path.table

    @property
    def statistics(self) -> Statistics:
        """The regions in which I/O is counted."""
        return self._path.statistics

    async def status(self, *, noflush: bool = False) -> list[tuple[int, int, str, str]]:
        """INFO of the live table: (start, length, type, params), in sectors."""
        return [line for line, _ in await self.status_by_name(noflush=noflush)]

    async def status_by_name(
        self, *, noflush: bool = False, within_s: float | None = None
    ) -> list[tuple[tuple[int, int, str, str], StatusFields]]:
        """As `status`, each line with the fields that its target tells by name.

        Args: within_s: how long the commit of each target may take; None: for ever.
        Raises: TableError, ETIMEDOUT.
        """
        table = self.active
        if table is None:
            return []
        noflush = noflush or self.state is not State.ACTIVE
        return await table.status(noflush=noflush, within_s=within_s)

    def table(
        self,
        *,
        inactive: bool = False,
        words: Callable[[Target], str] = lambda target: target.table_words(),
    ) -> list[tuple[int, int, str, str]]:
        """TABLE of one slot, or other `words` of it: (start, length, type, params), in sectors."""
        table = self.inactive if inactive else self.active
        if table is None:
            return []
        return table.lines(words)

    async def message(self, sector: int, words: Sequence[str]) -> str | None:
        """Hand a message to the target at `sector`; its answer, if any.

        Raises: TableError: no live table (ENXIO), sector outside, or the target refuses.
        """
        if words and words[0].startswith("@"):
            return await core_messages.carry_out(self, words)
        table = self.active
        if table is None:
            raise TableError("No such device or address", errnos.ENXIO)
        if not words:
            raise TableError("Invalid argument")
        if not 0 <= sector * SECTOR < table.size:
            raise TableError("Invalid argument: sector is outside the table")
        if table.failed:
            raise TableError("Input/output error", errnos.EIO)
        with table.use():
            return await table.target_at(sector * SECTOR).message(words)

    async def extents(self, offset: int, length: int) -> list[Extent]:
        """As `Device.extents`; waits while the device is suspended and may be resumed."""
        return await self._describe("extents", offset, length, _ask_extents)

    @property
    def contexts(self) -> tuple[str, ...]:
        """The contexts of every target of the live table. Targets without a context have the flags 0 in it."""
        if self.active is None:
            return ()
        names = (name for target in self.active.targets for name in target.contexts)
        return tuple(dict.fromkeys(names))

    async def context_extents(
        self, context: str, offset: int, length: int
    ) -> list[Extent]:
        """As `Device.context_extents`; waits as `extents` does."""

        def ask(target: Target, at: int, part: int) -> Awaitable[list[Extent]]:
            return target.context_extents(context, at, part)

        return await self._describe(context, offset, length, ask)

    async def _describe(
        self, op: str, offset: int, length: int, ask: Ask
    ) -> list[Extent]:
        running = self._path.running
        while not running.is_set():
            await running.wait()
        table = self.active
        if self.state is not State.ACTIVE or table is None or table.failed:
            raise DeviceError(errnos.EIO, self.name, op, offset, length)
        if offset + length > table.size:
            raise DeviceError(errnos.EINVAL, self.name, op, offset, length)
        return await table.describe(offset, length, ask)


def _ask_extents(target: Target, offset: int, length: int) -> Awaitable[list[Extent]]:
    return target.extents(offset, length)
