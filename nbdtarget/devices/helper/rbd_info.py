# SPDX-License-Identifier: Apache-2.0
"""A look at an RBD image: which image is it, and does somebody write to it?

An image of Ceph has an id that no other image has, and so has a snapshot. An image that was removed and made again under the same name
has another one. A client that writes to an image holds its exclusive lock; without the feature `exclusive-lock` that cannot be seen.
"""

import asyncio
import contextlib
import logging
from datetime import datetime
from typing import Any, Final, NamedTuple

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.look import look
from nbdtarget.devices.helper.rbd_name import RbdImage

__all__ = ["RbdState", "look_at_rbd"]

_TIME: Final = "%a %b %d %H:%M:%S %Y"  # in the time zone of this process

log = logging.getLogger(__name__)


class RbdState(NamedTuple):
    """The facts that tell an image from others.

    Attributes:
        image_id, snapshot_id: of Ceph; without a snapshot, `snapshot_id` is empty.
        mtime_ns: when the image was last written to, as Ceph notes it now and then; 0 for a snapshot, which never is.
    """

    image_id: str
    snapshot_id: str = ""
    mtime_ns: int = 0


async def look_at_rbd(name: str, image: RbdImage) -> RbdState:
    """Ask Ceph about an image. Args: name: for errors.

    Raises: ResolveError: there is none, it is written to, or the cluster does not answer.
    """
    if image.snapshot:
        info, snapshots = await asyncio.gather(
            _rbd(name, image, "info"), _rbd(name, image, "snap", "ls")
        )
        for each in snapshots if isinstance(snapshots, list) else ():
            if isinstance(each, dict) and each.get("name") == image.snapshot:
                return RbdState(_id(name, info), str(each.get("id", "")))
        raise ResolveError(name, f"the image has no snapshot {image.snapshot}")
    info, locks = await asyncio.gather(
        _rbd(name, image, "info"), _rbd(name, image, "lock", "ls")
    )
    if locks:
        raise ResolveError(
            name,
            "another client writes to the image, and what changes cannot be copied: make a snapshot"
            f" (`rbd snap create {str(image)[4:]}@NAME') and write {image}@NAME",
        )
    return RbdState(_id(name, info), mtime_ns=_mtime_ns(info))


async def _rbd(name: str, image: RbdImage, *command: str) -> Any:
    """Raises: ResolveError."""
    argv = ("rbd", *command, "--format", "json", *image.rbd_words())
    return await look(name, argv, f"rbd {' '.join(command)}")


def _id(name: str, info: Any) -> str:
    """Raises: ResolveError."""
    image_id = info.get("id") if isinstance(info, dict) else None
    if not isinstance(image_id, str) or not image_id:
        raise ResolveError(name, "`rbd info' did not tell the id of the image")
    return image_id


def _mtime_ns(info: dict[str, Any]) -> int:
    told = info.get("modify_timestamp")
    with contextlib.suppress(ValueError, OverflowError):
        return int(datetime.strptime(str(told), _TIME).timestamp()) * 1_000_000_000
    return 0  # older releases do not tell it
