# SPDX-License-Identifier: Apache-2.0
"""A batch of READs that begins in the ring pauses its connection whenever a bound is met then."""

import random
from types import SimpleNamespace
from typing import Any, cast

from nbdtarget.common.clock import Clock
from nbdtarget.common.turns import Turns
from nbdtarget.server.buffers import BufferPool
from nbdtarget.server.flow import RUNNING, Flow
from nbdtarget.server.limits import Budget, Limits
from nbdtarget.server.ring_reads import RingReads
from nbdtarget.server.shares import Share

REQUESTS = 12
BYTES = 4096


class Rig:
    """One connection whose requests are READs in the ring, and others that use the same budget.

    Attributes: nr_looks: how often the connection has looked at its bounds.
    """

    def __init__(self, limits: Limits) -> None:
        self.nr_looks = 0
        budget = Budget(limits)
        self.others = Share(budget, limits)
        self.flow = Flow(
            cast(Any, SimpleNamespace(pause=None, resume=None)),
            limits,
            budget,
            cast(BufferPool, None),
            cast(Clock, SimpleNamespace(now_ns=lambda: 0)),
            cast(Turns, None),
            lambda: None,
        )
        self.flow.share(Share(budget, limits))
        self.reads = RingReads(
            cast(Any, SimpleNamespace(reads_ended=lambda: None)),
            cast(Any, SimpleNamespace(look_at_bounds=self.look)),
            cast(Any, None),
            self.flow,
            lambda: not budget.nr_requests,
        )

    def look(self) -> None:
        self.nr_looks += 1


def test_each_bound_that_a_batch_meets_is_seen() -> None:
    picks = random.Random(13)
    nr_met = nr_spared = 0
    for _ in range(400):
        nr_max, bytes_max = picks.randint(1, REQUESTS), picks.randint(64, BYTES)
        limits = Limits(
            requests_in_flight_max=nr_max,
            export_requests_max=picks.randint(nr_max, REQUESTS),
            requests_total_max=picks.randint(REQUESTS, 2 * REQUESTS),
            bytes_in_flight_max=bytes_max,
            export_bytes_max=picks.randint(bytes_max, 2 * BYTES),
            bytes_total_max=picks.randint(2 * BYTES, 4 * BYTES),
            guaranteed_bytes=512,
            payload_max=64,
        )
        rig = Rig(limits)
        flow, others = rig.flow, rig.others
        for _ in range(20):
            if picks.random() < 0.5:
                others.give_back(others.nr_requests, others.nr_bytes)
                others.take(picks.randint(0, 4), picks.randint(BYTES, 4 * BYTES))
            if rig.reads.is_alone() and picks.random() < 0.5:
                nr, nr_bytes = (
                    1,
                    picks.randint(1, min(512, bytes_max)),
                )  # `room` is not asked
            else:
                nr_room, room = rig.reads.room()
                if nr_room < 1 or room < 1:
                    rig.reads.ended(flow.nr_requests, flow.nr_bytes)
                    continue
                nr = picks.randint(1, nr_room)
                nr_bytes = picks.randint(1, max(1, room // picks.randint(1, 6)))
            rig.nr_looks = 0
            rig.reads.begun(nr, nr_bytes)
            is_met = flow.bound_met(0) != RUNNING
            assert rig.nr_looks or not is_met
            nr_met += is_met
            nr_spared += not rig.nr_looks
            if picks.random() < 0.3:
                rig.reads.ended(flow.nr_requests, flow.nr_bytes)
    assert nr_met > 100
    assert nr_spared > 100
