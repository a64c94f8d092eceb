# SPDX-License-Identifier: Apache-2.0
"""The background looks for its next region in steps, however many wait to be tried again."""

from time import thread_time_ns

from nbdtarget.targets.clone.hydration import SCAN_RUNS_MAX
from tests.support.clone import Rig

NR_REGIONS = 1 << 14


async def test_step_of_the_scan_looks_at_few_runs_that_wait_to_be_tried_again() -> None:
    rig = await Rig(size=NR_REGIONS * 4096, content=bytes(NR_REGIONS * 4096)).start()
    target = rig.target
    for region in range(0, NR_REGIONS, 2):
        target._metadata.set_hydrated(region, region + 1)
    prison = target._regions.prison
    for region in range(1, NR_REGIONS, 2):
        prison.maybe_lock(region, region + 1)  # as good as waiting: no job may take it
    hydration = target._hydration
    began_ns = thread_time_ns()
    run, stop = hydration._look_for_run(0, NR_REGIONS)
    step_ns = thread_time_ns() - began_ns
    assert run is None
    assert 0 < stop <= 2 * SCAN_RUNS_MAX + 1
    assert step_ns < 100e6  # of processor time; half a millisecond here
    assert hydration._maybe_run(0, NR_REGIONS) is None
    await rig.suspend()
