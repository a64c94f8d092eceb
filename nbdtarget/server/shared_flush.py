# SPDX-License-Identifier: Apache-2.0
"""`SharedFlushes`: the requests that the compiled fast path leaves to be answered after a FLUSH of the device.

Theory of operation. The compiled path writes a WRITE with FUA like any other, and notes its cookie; of a FLUSH it notes only the
cookie. After the turn one FLUSH of the device serves all WRITEs of the batch, and another one all its FLUSHes. They are two because
a FLUSH also tells what the device has lost meanwhile, and a WRITE with FUA promises only its own data. Below, both
ride on one sync. Until then each of the requests counts as one in flight.

A client that is alone, and waits for the answer to one request, has its FLUSH marked as such (`ALONE`). If the device ends it at once, and all is well, the compiled
path sends the replies, as those of other requests. What the device may do for that: `nbdtarget.devices.file.sync_pace`.
"""

from collections.abc import Callable

from nbdtarget.bio import ALONE, IN_LOOP, OP_FLUSH, Bio
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
    """See the module head.

    Args: in_loop: the event loop itself may sync for a client that is alone (`Limits.inline_syncs`).
    """

    def __init__(
        self,
        host: Host,
        flow: Flow,
        device: Device,
        observer: ConnectionObserver,
        answers: Answers,
        traffic: Traffic,
        *,
        in_loop: bool,
    ) -> None:
        self._alone_flags = ALONE | IN_LOOP if in_loop else ALONE
        self._host, self._flow, self._device = host, flow, device
        self._observer, self._answers, self._traffic = observer, answers, traffic

    def submit(
        self, writes: list[int], flushes: list[int], is_alone: bool = False
    ) -> bool:
        """Take the cookies of WRITEs whose data the device has taken, and of FLUSHes.

        Args: is_alone: no other request of any client is known.

        Returns whether they have all ended well; then the caller answers them. That can only be if `is_alone`.
        """
        is_alone = is_alone and not (writes and flushes)
        well = False
        if writes:
            well = self._submit(
                writes, CMD_WRITE, CMD_FLAG_FUA, lambda status: status, is_alone
            )
        if flushes:
            mark, observer = self._observer.mark(), self._observer
            well = self._submit(
                flushes,
                CMD_FLUSH,
                0,
                lambda status: observer.end(mark, status),
                is_alone,
            )
        return well

    def _submit(
        self,
        cookies: list[int],
        command: int,
        flags: int,
        answer: Callable[[int], int],
        is_alone: bool,
    ) -> bool:
        """Args: answer: turns the status of the FLUSH into the errno for the client. Returns: see `submit`."""
        begun_ns = perf_counter_ns()
        is_here, well = is_alone, False

        def ended(bio: Bio) -> None:
            nonlocal well
            status = answer(bio.status)
            # The compiled path has counted the bytes of the WRITEs.
            taken_ns = perf_counter_ns() - begun_ns
            self._traffic.note(command, len(cookies), 0, taken_ns)
            self._flow.end_requests(len(cookies), 0)
            if self._host.is_closed:
                self._host.maybe_release()
                return
            if is_here and not status:
                well = True
                return
            for cookie in cookies:
                if status:
                    self._answers.fail((cookie, 0), command, flags, status)
                else:
                    self._answers.done((cookie, 0), command)
            self._host.flush_soon()

        self._flow.begin_requests(len(cookies), 0)
        bio_flags = self._alone_flags if is_alone else 0
        self._device.submit(Bio(OP_FLUSH, 0, 0, None, bio_flags, ended))
        is_here = False
        return well
