# SPDX-License-Identifier: Apache-2.0
"""`SharedFlushes`: the requests that the compiled fast path leaves to be answered after a FLUSH of the device.

Theory of operation. The compiled path writes a WRITE with FUA like any other, and notes its cookie; of a FLUSH it notes only the
cookie. After the turn one FLUSH of the device serves all WRITEs of the batch, and another one all its FLUSHes. They are two because
a FLUSH also tells what the device has lost meanwhile, and a WRITE with FUA promises only its own data. Below, both
ride on one sync. Until then each of the requests counts as one in flight.
"""

from collections.abc import Callable

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.common.clock import perf_counter_ns
from nbdtarget.devices.base import Device
from nbdtarget.devices.losses import ConnectionObserver
from nbdtarget.server.flow import Flow
from nbdtarget.server.replies import Answers
from nbdtarget.server.shared import Host
from nbdtarget.server.traffic import Traffic
from nbdtarget_protocol.consts import CMD_FLAG_FUA, CMD_FLUSH, CMD_WRITE

__all__ = ["SharedFlushes"]


class SharedFlushes:
    """See the module head."""

    def __init__(
        self,
        host: Host,
        flow: Flow,
        device: Device,
        observer: ConnectionObserver,
        answers: Answers,
        traffic: Traffic,
    ) -> None:
        self._host, self._flow, self._device = host, flow, device
        self._observer, self._answers, self._traffic = observer, answers, traffic

    def submit(self, writes: list[int], flushes: list[int]) -> None:
        """Take the cookies of WRITEs whose data the device has taken, and of FLUSHes."""
        if writes:
            self._submit(writes, CMD_WRITE, CMD_FLAG_FUA, lambda status: status)
        if flushes:
            mark, observer = self._observer.mark(), self._observer
            self._submit(
                flushes, CMD_FLUSH, 0, lambda status: observer.end(mark, status)
            )

    def _submit(
        self,
        cookies: list[int],
        command: int,
        flags: int,
        answer: Callable[[int], int],
    ) -> None:
        """Args: answer: turns the status of the FLUSH into the errno for the client."""
        begun_ns = perf_counter_ns()

        def ended(bio: Bio) -> None:
            status = answer(bio.status)
            # The compiled path has counted the bytes of the WRITEs.
            taken_ns = perf_counter_ns() - begun_ns
            self._traffic.note(command, len(cookies), 0, taken_ns)
            self._flow.end_requests(len(cookies), 0)
            if self._host.is_closed:
                self._host.maybe_release()
                return
            for cookie in cookies:
                if status:
                    self._answers.fail((cookie, 0), command, flags, status)
                else:
                    self._answers.done((cookie, 0), command)
            self._host.flush_soon()

        self._flow.begin_requests(len(cookies), 0)
        self._device.submit(Bio(OP_FLUSH, 0, 0, None, 0, ended))
