# SPDX-License-Identifier: Apache-2.0
"""The messages of a cache: what each does.

`MESSAGES` in `table` lists them. All but `flush_origin` are refused when nothing can be recorded any more.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Callable, Sequence
from typing import Final

from nbdtarget.common.clock import Clock
from nbdtarget.common.errors import DeviceError, TableError
from nbdtarget.policies.base import PolicyConfigError
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.invalidation import invalidate
from nbdtarget.targets.cache.migrations import Migrations
from nbdtarget.targets.cache.table import parse_core_value, parse_ranges

__all__ = ["Messages"]

INVALIDATED_AT_ONCE: Final = 1024  # by one commit

log = logging.getLogger(__name__)


class Messages:
    """Carries messages out. See the module head.

    Args:
        refusal: makes the error for a message that there is not, from its words and the reason.

    Attributes:
        changing: held while a message changes mappings.
        is_stopped: from presuspend to resume: a message must not change mappings.
    """

    def __init__(
        self,
        blocks: Blocks,
        migrations: Migrations,
        clock: Clock,
        refusal: Callable[[Sequence[str], str], TableError],
    ) -> None:
        self._blocks = blocks
        self._migrations = migrations
        self._clock = clock
        self._refusal = refusal
        self.changing = asyncio.Lock()
        self.is_stopped = True

    async def carry_out(self, words: Sequence[str]) -> None:
        """Carry out a message. Raises: TableError."""
        blocks, requests = self._blocks, self._migrations.requests
        if [word.lower() for word in words] == ["flush_origin"]:
            await self._flush_origin()
            return
        if not blocks.is_writable:
            raise TableError(
                "unable to service cache target messages in READ_ONLY or FAIL mode",
                errnos.EOPNOTSUPP,
            )
        nr_oblocks = blocks.nr_oblocks
        match [words[0].lower(), *words[1:]]:
            case ["invalidate_cblocks", *ranges]:
                await self._invalidate(ranges)
            case ["invalidate_all"]:
                await self._invalidate_all()
            case ["clean_now"]:
                self._migrations.clean_now()
            case ["pin" | "warm" | "unpin" as verb]:
                raise TableError("Invalid argument", hint=f"`{verb}' needs a block")
            case ["pin", *ranges]:
                requests.add(parse_ranges(ranges, nr_oblocks, "oblock"), pin=True)
            case ["warm", *ranges]:
                requests.add(parse_ranges(ranges, nr_oblocks, "oblock"), pin=False)
            case ["unpin", *ranges]:
                await requests.unpin(parse_ranges(ranges, nr_oblocks, "oblock"))
            case [_, value]:
                self._set_value(words[0], value)
            case _:
                raise self._refusal(words, "Invalid argument")

    async def _flush_origin(self) -> None:
        """Tell whether the origin takes a flush now; commits nothing. Raises: TableError."""
        try:
            await self._blocks.origin.flush()
        except DeviceError as error:
            raise TableError(str(error), error.errno) from error

    def _set_value(self, key: str, value: str) -> None:
        options = self._blocks.options
        try:
            match key.lower():
                case "migration_threshold":
                    options.migration_threshold = parse_core_value(key, value)
                case "migration_rate":
                    options.migration_rate = parse_core_value(key, value)
                    self._migrations.rate.set(options.migration_rate)
                case _:
                    warning = self._blocks.policy.set_config_value(key, value)
                    if warning:
                        log.warning("%s: %s", self._blocks.name, warning)
        except PolicyConfigError as error:
            raise self._refusal([key, value], str(error)) from error
        self._migrations.wake()

    async def _invalidate(self, ranges: Sequence[str]) -> None:
        if not self._blocks.is_passthrough:
            reason = "cache has to be in passthrough mode for invalidation"
            raise TableError(reason, errnos.EPERM)
        for begin, end in parse_ranges(ranges, self._blocks.metadata.nr_cblocks):
            await self._invalidate_range(begin, end)

    async def _invalidate_range(self, begin: int, end: int) -> None:
        for at in range(begin, end, INVALIDATED_AT_ONCE):
            cblocks = range(at, min(at + INVALIDATED_AT_ONCE, end))
            async with self.changing:
                if self.is_stopped:
                    raise TableError("cache is suspended", errnos.EBUSY)
                await invalidate(self._blocks, cblocks, self._clock)

    async def _invalidate_all(self) -> None:
        """Give up what is cached: the origin has been changed without us, and cannot tell."""
        self._blocks.discards.load(None)  # what is discarded there is not known, either
        await self._invalidate_range(0, self._blocks.metadata.nr_cblocks)
        nr_dirty = self._blocks.metadata.nr_dirty
        if nr_dirty:
            raise TableError(
                f"{nr_dirty} dirty blocks stay cached: they are newer than the origin",
                errnos.EBUSY,
            )
