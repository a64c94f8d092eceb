# SPDX-License-Identifier: Apache-2.0
"""An NbdDevice that is connected to the strict server, and its bios."""

from nbdtarget.bio import (
    OP_READ,
    OP_WRITE,
    Bio,
)
from nbdtarget.devices.nbd.device import NbdDevice
from nbdtarget.devices.resolve import open_device
from tests.support.nbd_server import StrictServer

__all__ = ["SIZE", "bio_of", "device_of"]

SIZE = 1 << 20


async def device_of(server: StrictServer, *, read_only: bool = False) -> NbdDevice:
    device = await open_device(server.uri, read_only=read_only)
    assert isinstance(device, NbdDevice)
    return device


def bio_of(op: int, offset: int, length: int, flags: int = 0) -> Bio:
    payload = memoryview(bytearray(length)) if op in (OP_READ, OP_WRITE) else None
    return Bio(op, offset, length, payload, flags, lambda _: None)
