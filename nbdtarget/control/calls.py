# SPDX-License-Identifier: Apache-2.0
"""`Calls` carries out verbs by their names: for the HTTP of the control socket, and for the Python API.

A verb that has begun is carried out even if its caller goes away or is cancelled, except for `wait` and `events`, which
change nothing and could take long. Verbs run side by side: none waits for the answer of another.
"""

import asyncio
import errno as errnos
import logging
from typing import Final

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.turns import Tasks
from nbdtarget.control.messages import Answer, Request
from nbdtarget.control.verbs import Verbs

__all__ = ["Calls", "errno_of"]

log = logging.getLogger(__name__)

WAITING: Final = ("wait", "events", "map")  # they change nothing, and may take long


class Calls:
    """Carries out the verbs of one server, on the loop of that server."""

    def __init__(self, verbs: Verbs) -> None:
        self._verbs = verbs
        self._running = Tasks(failed=_is_answered)

    async def carry_out(self, verb: str, request: Request) -> Answer:
        """Carry out `verb`. Raises: NbdTargetError: it has failed; Exception: a bug, which has been logged."""
        task = self._running.start(self._carry_out(verb, request))
        answer: Answer = await (task if verb in WAITING else asyncio.shield(task))
        return answer

    async def _carry_out(self, verb: str, request: Request) -> Answer:
        try:
            return await self._verbs.carry_out(verb, request)
        except NbdTargetError:
            raise
        except (
            Exception
        ):  # a fault of ours: the log has the whole story, the caller an error
            log.exception("%s %r failed", verb, request)
            raise


def errno_of(error: NbdTargetError) -> int:
    """Return the errno of a failure: ResolveError, ConstructorError and TableError have one, the base has not."""
    errno: int = getattr(error, "errno", errnos.EINVAL)
    return errno


def _is_answered(_: BaseException) -> None:
    """The caller gets the failure, unless it has gone."""
