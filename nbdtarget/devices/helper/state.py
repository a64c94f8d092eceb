# SPDX-License-Identifier: Apache-2.0
"""`ImageState`: what tells the image that a helper has opened from another one, or from a later state of it.

Theory of operation. A helper that dies is started again, perhaps hours later, and opens its image by its name. If another image had been put in its place,
half of one and half of the other would be copied. So the state is taken when the helper has opened the image, and compared whenever it has opened it
again. Some of it is recorded in metadata (`ids`, `mtime_ns`), and compared at the next start.

    a file         device number, inode, size and time of last modification
    an RBD image   its id and that of the snapshot; without a snapshot also the time of last modification
    what lies in a container   nothing: the container pins it
    anything else  nothing is known
"""

import asyncio
import errno as errnos
import os
from typing import NamedTuple

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.rbd_info import look_at_rbd
from nbdtarget.devices.helper.words import HelperName, QemuName

__all__ = ["ImageState", "look_at_image"]


class ImageState(NamedTuple):
    """See the module head.

    Attributes:
        told: what must not change, by what it is called in a sentence.
        ids: for metadata, "key=value".
        mtime_ns: when it was last written to; 0: it is not known.
        is_pinned: equal ids prove equal content.
    """

    told: tuple[tuple[str, str], ...] = ()
    ids: tuple[str, ...] = ()
    mtime_ns: int = 0
    is_pinned: bool = False

    def difference(self, found: "ImageState") -> str:
        """Say what proves that `found` is another image, or was changed; empty: nothing does."""
        new = dict(found.told)
        for key, value in self.told:
            if new.get(key, value) != value:
                return f"its {key} is {new[key]}, not {value}"
        return ""


async def look_at_image(words: HelperName) -> ImageState:
    """Look at the image. Raises: ResolveError: Ceph has no such image, or does not answer."""
    if words.file:
        return await asyncio.to_thread(_file_state, words)
    if isinstance(words, QemuName) and words.rbd is not None:
        state = await look_at_rbd(words.shown, words.rbd)
        ids = {"image-id": state.image_id}
        if state.snapshot_id:
            ids["snapshot-id"] = state.snapshot_id
        return ImageState(
            (*ids.items(), ("time of last modification", str(state.mtime_ns))),
            tuple(f"{key}={value}" for key, value in ids.items()),
            state.mtime_ns,
            is_pinned=bool(state.snapshot_id),
        )
    return ImageState()


def _file_state(words: HelperName) -> ImageState:
    """Raises: ResolveError."""
    try:
        status = os.stat(words.file)
    except OSError as error:
        reason = error.strerror or "cannot be looked at"
        raise ResolveError(words.shown, reason, error.errno or errnos.EIO) from None
    told = {
        "place": f"{status.st_dev}:{status.st_ino}",
        "size": str(status.st_size),
        "time of last modification": f"{status.st_mtime_ns} ns",
    }
    return ImageState(tuple(told.items()), mtime_ns=status.st_mtime_ns)
