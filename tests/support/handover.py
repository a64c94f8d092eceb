# SPDX-License-Identifier: Apache-2.0
"""What one server process hands over to another one in tests of how that is done."""

from collections.abc import Sequence

from nbdtarget.control.tokens import NO_TOKENS
from nbdtarget.daemon.handover.messages import Moved
from nbdtarget.dm.handover import DeviceState
from nbdtarget.server.limits import Limits
from nbdtarget.server.moving import ListenerState

__all__ = ["moved"]


def moved(devices: Sequence[DeviceState] = ()) -> Moved:
    """A server with these devices, a control socket, and nothing else."""
    return Moved(
        devices=tuple(devices),
        listener=ListenerState((), (), Limits()),
        control="/run/c.sock",
        control_path=None,
        tokens=NO_TOKENS,
        has_device_metrics=True,
        rules={},
        kept_rules={},
    )
