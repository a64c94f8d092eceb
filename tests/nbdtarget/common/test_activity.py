# SPDX-License-Identifier: Apache-2.0
"""`ACTIVITY`: a number that only grows. Who counts: `server/test_input.py`, `fast/test_receiver.py`."""

from nbdtarget.common.activity import ACTIVITY, Activity


def test_it_begins_at_zero_and_the_process_has_one() -> None:
    assert Activity().nr_batches == 0
    assert isinstance(ACTIVITY, Activity)
