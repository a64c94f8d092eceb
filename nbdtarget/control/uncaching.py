# SPDX-License-Identifier: Apache-2.0
"""The verb `uncache`: the job of `uncache.py`, carried out by the server itself.

It ends when the cache is removed, when it is stopped (the same verb with `stop`), or with an error. The client that has asked for it may
disconnect meanwhile. One device is uncached once at a time. How far it is, the figures of the device say (`uncaching`, and its dirty blocks), and
so do the lines of the log.
"""

import asyncio
import errno as errnos
import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, TypeVar

from nbdtarget.common.errors import NbdTargetError, TableError
from nbdtarget.common.turns import Tasks
from nbdtarget.control import messages as m

if TYPE_CHECKING:
    from nbdtarget.control.uncache import CacheLine, Draining, UncacheJob

__all__ = ["Uncaching"]

log = logging.getLogger(__name__)

A = TypeVar("A", bound=m.Answer)


class Uncaching:
    """The jobs of one server.

    Args: carry_out: carries out a verb of the server.
    """

    def __init__(
        self, carry_out: Callable[[str, m.Request], Awaitable[m.Answer]]
    ) -> None:
        self._carry_out = carry_out
        self._asked = Tasks(failed=_is_answered)
        self._jobs: dict[str, UncacheJob] = {}

    def is_under_way(self, name: str) -> bool:
        """Whether a device is being uncached."""
        return name in self._jobs

    async def start(self, name: str) -> m.UncacheAnswer:
        """Uncache a device. Raises: TableError: it cannot be done, or not be ended, and the cache serves on."""
        # Here: every server has this verb, and few have a cache, which is imported with it.
        from nbdtarget.control.uncache import UncacheError, UncacheJob

        if name in self._jobs:
            raise TableError(
                f"Device or resource busy: {name} is being uncached", errnos.EBUSY
            )
        reporter = _Reporter(name)
        job = self._jobs[name] = UncacheJob(name, self._ask, reporter)
        try:
            is_done = await job.run()
        except UncacheError as error:
            cause = error.__cause__
            errno = cause.errno if isinstance(cause, TableError) else errnos.EINVAL
            log.warning("/dev/mapper/%s: uncache: %s", name, error.reason)
            raise TableError(str(error), errno) from error
        except NbdTargetError as error:
            log.warning("/dev/mapper/%s: uncache: %s", name, error)
            raise
        finally:
            del self._jobs[name]
        return m.UncacheAnswer(is_done, reporter.said)

    def stop(self, name: str) -> m.UncacheAnswer:
        """Stop a job as soon as that leaves nothing half done. Raises: TableError: there is none."""
        job = self._jobs.get(name)
        if job is None:
            raise TableError(f"{name} is not being uncached", errnos.ENOENT)
        job.stop()
        return m.UncacheAnswer(False, f"{name}: it stops as soon as it can")

    async def _ask(self, verb: str, request: m.Request, answer_type: type[A]) -> A:
        asked = self._asked.start(self._answer(verb, request))
        answer = await asyncio.shield(asked)
        assert isinstance(answer, answer_type)
        return answer

    async def _answer(self, verb: str, request: m.Request) -> m.Answer:
        return await self._carry_out(verb, request)


class _Reporter:
    """Writes lines of the log. Attributes: said: the last one, for the answer."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._has_begun = False
        self.said = ""

    def draining(self, now: "Draining") -> None:
        if not self._has_begun:
            self._has_begun = True
            self._say(f"uncache: {now.dirty_blocks} blocks are to be written back")

    def stuck(self, now: "Draining", for_s: float) -> None:
        last = f": {now.last_error}" if now.last_error else ""
        log.warning(
            "/dev/mapper/%s: uncache: no block has been written back for %.0f s (%d left)%s",
            self._name,
            for_s,
            now.dirty_blocks,
            last,
        )

    def interrupted(self, now: "Draining | None") -> None:
        if now is None:
            self._say("uncache: stopped; nothing has been changed")
        else:
            self._say(
                f"uncache: stopped; {now.dirty_blocks} dirty blocks are left. The cache stays in service (mode"
                " writethrough, policy cleaner)"
            )

    def uncached(self, line: "CacheLine") -> None:
        self._say(
            f"{line.origin} alone is the disk; {line.cache} and {line.metadata} are not used any more"
        )

    def _say(self, text: str) -> None:
        self.said = text
        log.info("/dev/mapper/%s: %s", self._name, text)


def _is_answered(_: BaseException) -> None:
    """The job gets the failure, unless it has gone."""
