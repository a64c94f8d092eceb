# SPDX-License-Identifier: Apache-2.0
"""A look at an image before it is opened: which other files does it name?

Theory of operation. A qcow2 image may name a backing file or a data file, and a VMDK its extents: QEMU opens them with the rights of
this server, and their bytes would be those of the disk. The maker of an image could name any file of this machine.
So `qemu-img info` looks at the image first, and what it names is refused unless the name of the disk allows it. The look is bounded in CPU
time, memory, time and output, because an image may be made to cost much.

The image could be exchanged between the look and the opening by those who may write to its directory. The files that it names when it is
opened are then not looked at: let images come from a directory that only you can write to.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.words import printable
from nbdtarget.devices.helper.look import look
from nbdtarget.devices.helper.process import LINE_MAX
from nbdtarget.devices.helper.words import QemuName

__all__ = ["references", "refuse_references"]

MEMORY: Final = 1 << 30
SHOWN_MAX: Final = 3

# They consist of one file, and nothing in it can name another one.
_ALONE: Final = frozenset({"raw", "luks"})


async def refuse_references(image: QemuName, fds: Sequence[int] = ()) -> None:
    """Refuse an image that names other files, unless its name allows that.

    Args: fds: descriptors that the look needs, by their numbers.
    Raises: ResolveError: it does, or it cannot be looked at.
    """
    if image.allows_references or image.format in _ALONE:
        return
    # As QEMU calls what is read from a container.
    container = f"nbd+unix://?socket={image.container_socket}"
    own = container if image.container else image.what
    found = list(references(await _info(image, fds), own))
    if not found:
        return
    shown = ", ".join(printable(each, LINE_MAX) for each in found[:SHOWN_MAX])
    more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
    raise ResolveError(
        image.shown,
        f"the image refers to {shown}{more}: write {image.shown}{'&' if '#' in image.shown else '#'}"
        "allow=references if you trust its maker to name only what may be read",
    )


def references(info: dict[str, Any], what: str) -> Iterator[str]:
    """Name what an image refers to: what it is, and its name.

    Args:
        info: as `qemu-img info --output=json` prints it.
        what: the image itself, which a VMDK names as its own extent.
    """
    if backing := info.get("backing-filename"):
        yield f"the backing file {backing}"
    specific = info.get("format-specific")
    data = specific.get("data") if isinstance(specific, dict) else None
    if not isinstance(data, dict):
        return
    if data_file := data.get("data-file"):
        yield f"the data file {data_file}"
    extents = data.get("extents")
    for extent in extents if isinstance(extents, list) else ():
        filename = extent.get("filename") if isinstance(extent, dict) else extent
        if filename != what:
            yield f"the extent {filename}"


async def _info(image: QemuName, fds: Sequence[int]) -> dict[str, Any]:
    """Raises: ResolveError."""
    argv = ("qemu-img", "info", "--output=json", *image.image_words)
    info = await look(image.shown, argv, "qemu-img info", fds=fds, memory=MEMORY)
    if not isinstance(info, dict):
        raise ResolveError(image.shown, "`qemu-img info' did not print what it should")
    return info
