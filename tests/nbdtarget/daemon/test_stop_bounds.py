# SPDX-License-Identifier: Apache-2.0
"""The bounds of a stop follow from one number."""

from nbdtarget.daemon.stop_bounds import StopBounds


def test_bounds_follow_from_the_whole_time() -> None:
    assert StopBounds.of(None) == StopBounds(60.0)
    assert (StopBounds().requests_s, StopBounds().devices_s) == (10.0, 30.0)
    assert (StopBounds(6.0).requests_s, StopBounds(6.0).devices_s) == (1.0, 3.0)
    forever = StopBounds.of(0)
    assert (forever.total_s, forever.requests_s, forever.devices_s) == (None, 10, None)
