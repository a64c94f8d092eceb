# SPDX-License-Identifier: Apache-2.0
"""`Turns`: work that takes long goes on in slices, one slice in each turn of the loop.

Used by the connections of a server, for what they have received and takes longer than a slice (`Limits.turn_us`,
`Limits.turn_bytes_max`), and by devices whose work is done inline, some at a time. However many ask, one
of them has its turn in each turn of the loop, in the order of asking; between two of them the loop
serves everybody else's sockets, timers and signals.
"""

import asyncio
from collections import deque
from collections.abc import Callable

__all__ = ["Turns"]


class Turns:
    """See the module head. Of the loop that runs when somebody asks."""

    __slots__ = ("_asked",)

    def __init__(self) -> None:
        self._asked: deque[Callable[[], None]] = deque()

    def ask(self, go_on: Callable[[], None]) -> None:
        """Call `go_on` when it is its turn. It must not raise."""
        self._asked.append(go_on)
        if len(self._asked) == 1:
            asyncio.get_running_loop().call_soon(self._next)

    async def wait(self) -> None:
        """Return when it is the caller's turn."""
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()

        def begin() -> None:
            if not turn.done():  # it is, if the caller was cancelled
                turn.set_result(None)

        self.ask(begin)
        await turn

    def _next(self) -> None:
        # It stays in the queue until it has ended, so that nothing is scheduled twice.
        self._asked[0]()
        self._asked.popleft()
        if self._asked:
            asyncio.get_running_loop().call_soon(self._next)
