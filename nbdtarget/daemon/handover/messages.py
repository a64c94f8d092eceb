# SPDX-License-Identifier: Apache-2.0
"""The messages between the two processes of a hand-over.

    old process                            new process
    Hello: which format it speaks   ->
                                    <-     Hello, when all of its code is loaded
    freezes clients, parks devices
    Moved: everything, with the     ->
      sockets
                                           opens the devices
                                    <-     Prepared
    Go                              ->
    ends                                   lets I/O go

Before Go, the new process changes nothing that the old one needs to go on, and either of them may say Failed. Go cannot be taken
back. If the old process ends without it, the new one goes on as well: no other process has the disks then.

Sockets stay as they are: how each is protected is in Moved, and not looked up in the configuration file, which may say something
else by now. What protects clients and disks has no default there, so that a process that does not know of it refuses.

FORMAT grows when a message changes so that the other side would misunderstand it. A field with a default may be added.
"""

from typing import Final

import msgspec

from nbdtarget.common.access import RuleTexts
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.dm.handover import DeviceState
from nbdtarget.server.moving import ListenerState

__all__ = ["FORMAT", "Failed", "Go", "Hello", "Message", "Moved", "Prepared"]

FORMAT: Final = 2


class Hello(msgspec.Struct, frozen=True, tag=True):
    """The first message of each side. `version`: of nbdtarget."""

    format: int
    version: str


class Moved(msgspec.Struct, frozen=True, tag=True):
    """Everything that goes over.

    Attributes:
        has_control: the first descriptor is the control socket, the second the lock of its path, if it has one.
        control: its address; `control_path`: its path, if that is ours.
        plan: what a `clone`, `cache` or `export` had planned, as MessagePack; "" for `serve`.
        rules: who may attach to which export, as it was said by command; `kept_rules`: as it was said in the configuration file,
            for devices that it does not name any more.
        tokens: what the control socket asks for.
        metrics: the address of the socket for metrics, "": there is none. Its descriptors come behind those of the control
            socket, as those do. `metrics_path`: as `control_path`.
        has_device_metrics: metrics tell of each device.
    """

    devices: tuple[DeviceState, ...]
    listener: ListenerState
    control: str
    control_path: str | None
    tokens: ControlTokens
    has_device_metrics: bool
    rules: RuleTexts
    kept_rules: RuleTexts
    plan: bytes = b""
    metrics: str = ""
    metrics_path: str | None = None


class Prepared(msgspec.Struct, frozen=True, tag=True):
    """The new process has opened everything."""


class Go(msgspec.Struct, frozen=True, tag=True):
    """The old process does nothing any more. `seconds`: since it began to hold back requests."""

    seconds: float


class Failed(msgspec.Struct, frozen=True, tag=True):
    """This side gives up."""

    reason: str


Message = Hello | Moved | Prepared | Go | Failed
