# SPDX-License-Identifier: Apache-2.0
"""Where metrics are told alone: the options win over the configuration file."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.paths import TcpControl
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.metrics_options import MetricsOptions


def test_options_win_one_by_one() -> None:
    said, configured = MetricsOptions("unix:/a"), MetricsOptions("/b", False)
    both = said.or_else(configured)
    assert both == MetricsOptions("unix:/a", False)
    assert both.where == Path("/a")
    assert not both.tells_of_devices
    assert MetricsOptions(None, True).or_else(configured) == MetricsOptions("/b", True)
    nothing = MetricsOptions()
    assert (nothing.where, nothing.tells_of_devices) == (None, True)
    assert MetricsOptions("tcp:[::1]:9864").where == TcpControl("::1", 9864)


async def test_a_wrong_address_is_found_before_anything_is_made() -> None:
    with pytest.raises(NbdTargetError, match="tcp:x: is not tcp:HOST:PORT"):
        Daemon(metrics=MetricsOptions("tcp:x"))
