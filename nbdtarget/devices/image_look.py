# SPDX-License-Identifier: Apache-2.0
"""Reads what of a device shows whether it is an image in a format. Nothing here writes, and nothing is opened because of it."""

from nbdtarget.devices.base import Device
from nbdtarget.devices.image_format import (
    HEAD_BYTES,
    ImageFormat,
    maybe_image_format,
    tail_start,
)

__all__ = ["maybe_image_on"]


async def maybe_image_on(device: Device) -> ImageFormat | None:
    """Say what the device begins or ends like; None if it may well be a raw disk.

    Raises: DeviceError: it cannot be read.
    """
    head = await device.read(0, min(HEAD_BYTES, device.size))
    found = maybe_image_format(head.tobytes())
    start = tail_start(device.size)
    # A disk that can only be read in order would be read to its end here.
    if found is not None or start is None or device.is_forward_only:
        return found
    tail = await device.read(start, device.size - start)
    return maybe_image_format(b"", tail.tobytes())
