# SPDX-License-Identifier: Apache-2.0
"""How many bytes a second the background may copy.

Theory of operation. The bytes of a job are charged when the job starts, and the next one
may start when they are paid for, at `bytes_per_s`. So no more is ever copied ahead of its
time than one job, and `job_bytes_max` keeps jobs short; but a region is copied whole, however
long it takes to pay for. Credit is saved up for `CREDIT_S` only: enough for timers that
fire late, too little for a burst after a pause.
"""

from typing import Final

from nbdtarget.common.clock import Clock

__all__ = ["CREDIT_S", "JOB_S_MAX", "Rate"]

CREDIT_S: Final = 0.05
JOB_S_MAX: Final = 0.1  # what one job may be charged, if that is a region at least
_NS: Final = 1_000_000_000


class Rate:
    """A bound for bytes a second; 0: none."""

    def __init__(self, clock: Clock, bytes_per_s: int) -> None:
        self._clock = clock
        self._bytes_per_s = bytes_per_s
        self._paid_ns = 0

    @property
    def bytes_per_s(self) -> int:
        return self._bytes_per_s

    def set(self, bytes_per_s: int) -> None:
        """Use this rate from now on, and forget the bytes that were charged at the old one."""
        self._bytes_per_s = bytes_per_s
        self._paid_ns = 0

    @property
    def job_bytes_max(self) -> int | None:
        """Bytes that one job should copy at most; None: as many as it likes."""
        if not self._bytes_per_s:
            return None
        return int(self._bytes_per_s * JOB_S_MAX)

    @property
    def ready_ns(self) -> int:
        """The time at which the next job may start (Clock.now_ns); past times mean now."""
        return self._paid_ns

    def charge(self, length: int) -> None:
        """A job that copies `length` bytes starts."""
        if self._bytes_per_s and length:
            begun_ns = max(self._paid_ns, self._clock.now_ns() - int(CREDIT_S * _NS))
            self._paid_ns = begun_ns + length * _NS // self._bytes_per_s
