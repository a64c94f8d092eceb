# SPDX-License-Identifier: Apache-2.0
"""SIGTERM on a simulated machine: the real `Daemon` ends the life's registry and listener.

Perhaps a server hangs from that moment on, for good. What must hold:

    bound      the process ends within the bound of the daemon, in simulated time
    a source   when nothing hangs but what is only read, all is committed, and nothing is left behind
"""

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final

from nbdtarget.daemon.daemon import CONTROL_S_MAX, Daemon
from nbdtarget.daemon.process import forget_what_hangs
from nbdtarget.daemon.stop_bounds import STOP_S_MAX
from tests.sim.rigs import Role

if TYPE_CHECKING:
    from tests.sim.life import Life

__all__ = ["Stop"]

REQUEST_S_MAX: Final = 1.0
HANGS: Final = 0.5  # of the stops of a machine with servers


class Stop:
    """One stop. See the module head.

    Attributes:
        hangs: a server does, for good.
    """

    def __init__(self, life: "Life", rng: random.Random) -> None:
        self._life = life
        self._random = rng
        self._is_waited_for = False  # for what is written to, and may take too long
        self._source_hangs = False
        self.hangs = False
        self._nr_departures = 0
        self._is_unflushed = False  # a device was suspended without a flush

    async def prepare(self) -> None:
        """By seed, let a server hang for good, so that clients already wait for it when the signal comes."""
        life = self._life
        self._is_waited_for = life.may_fail or not life.are_backends_well
        if not life.are_backends_well:
            life.corner()  # a stop gives up what hangs sooner than a server that goes on, and says so
        self._source_hangs = self._hang()
        self._nr_departures = life.nr_departures
        if self._source_hangs:
            await asyncio.sleep(self._random.choice((0.0, 0.01, 1.0)))

    async def run(self) -> bool:
        """Stop. Returns whether everything was closed in time. Raises: AssertionError."""
        life = self._life
        # A stop is some twenty requests, one after the other, to each disk.
        is_slow = life.is_slow or any(
            max(disk.latency.high_s, disk.latency.stall_s) > REQUEST_S_MAX
            for disk in life.disks.values()
        )
        if is_slow or self._nr_departures != life.nr_departures:
            self._is_waited_for = True
            life.corner()
        close_registry = life.registry.close
        has_ended = False

        async def close() -> list[str]:
            nonlocal has_ended
            await life.is_cutting.acquire()
            uncommitted = await self._close(close_registry)
            has_ended = True
            return uncommitted

        life.registry.close = close  # type: ignore[method-assign]
        daemon = Daemon()
        daemon.registry, daemon._listener = life.registry, life.listener
        began_s = life.loop.time()
        try:
            await daemon.close()
        finally:
            forget_what_hangs()  # it is this process
        took_s = life.loop.time() - began_s
        life.note("stopped", round(took_s, 3), has_ended)
        assert took_s <= STOP_S_MAX + CONTROL_S_MAX, f"the stop has taken {took_s} s"
        has_gone = self._nr_departures != life.nr_departures
        if self._source_hangs and not (self._is_waited_for or has_gone):
            life.counts["stops without a source"] += 1
            assert has_ended, "nothing but a source hangs, and it is waited for"
            # A device that the operator has suspended without a flush stays unflushed.
            assert daemon.is_committed or self._is_unflushed, (
                "nothing but a source hangs"
            )
        return has_ended

    def _hang(self) -> bool:
        """Have a server hang for good; True: it is a source's."""
        life, rng = self._life, self._random
        if not life.backends or rng.random() >= HANGS:
            return False
        roles = {disk.name: disk.role for disk in life.rig.disks}
        hosts = sorted(life.backends)
        # A source more often: it must be in use just then to prove anything.
        hosts += 3 * [host for host in hosts if roles["/" + host] is Role.SOURCE]
        host = rng.choice(hosts)
        is_source = roles["/" + host] is Role.SOURCE
        self.hangs = True
        self._is_waited_for |= not is_source
        life.note(host, "hangs for good")
        life.counts["stops over what hangs"] += 1
        life.corner()
        life.backends[host].hang()
        return is_source

    async def _close(
        self, close_registry: "Callable[[], Awaitable[list[str]]]"
    ) -> list[str]:
        """Close the registry, and let the model count its flush as a promise."""
        life = self._life
        suspended = set(life.suspended)
        self._is_unflushed = bool(suspended)
        # Requests that wait in a suspended device end with an error when everything stops.
        if not suspended <= {"d"}:
            life.corner()
        promised = life.model.start_flush()
        uncommitted = await close_registry()
        is_committed = not (self._is_waited_for and uncommitted)
        is_durable = life.is_sound and not suspended and is_committed
        life.model.end_flush(promised, ok=is_durable)
        return uncommitted
