# SPDX-License-Identifier: Apache-2.0
"""A look at an image before it is opened: which other files does it name?

Theory of operation. A qcow2 image may name a backing file or a data file, and a VMDK its extents: QEMU opens them with the rights of
this server, and their bytes would be those of the disk. The maker of an image could name any file of this machine.
So `qemu-img info` looks at the image first, and what it names is refused unless the name of the disk allows it. The look is bounded in CPU
time, memory, time and output, because an image may be made to cost much.

The image could be exchanged between the look and the opening by those who may write to its directory. What it names when it is
opened is then not looked at: let images come from a directory that only you can write to.
"""

import asyncio
import json
from asyncio.subprocess import PIPE, Process
from collections.abc import Iterator
from typing import Any, Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.words import printable
from nbdtarget.devices.helper.process import LINE_MAX, kill_all, launch
from nbdtarget.devices.helper.programs import missing
from nbdtarget.devices.helper.words import QemuName

__all__ = ["references", "refuse_references"]

CPU_S: Final = 30
MEMORY: Final = 1 << 30
LOOK_S_MAX: Final = 60.0
OUTPUT_MAX: Final = 1 << 20
SHOWN_MAX: Final = 3

# They consist of one file, and nothing in it can name another one.
_ALONE: Final = frozenset({"raw", "luks"})


async def refuse_references(image: QemuName) -> None:
    """Refuse an image that names other files, unless its name allows that.

    Raises: ResolveError: it does, or it cannot be looked at.
    """
    if image.allows_references or image.format in _ALONE:
        return
    found = list(references(await _info(image), image.what))
    if not found:
        return
    shown = ", ".join(printable(each, LINE_MAX) for each in found[:SHOWN_MAX])
    more = f" and {len(found) - SHOWN_MAX} more" if len(found) > SHOWN_MAX else ""
    raise ResolveError(
        image.name,
        f"the image refers to {shown}{more}: write {image.name}{'&' if '#' in image.name else '#'}"
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


async def _info(image: QemuName) -> dict[str, Any]:
    """Raises: ResolveError."""
    reason = missing("qemu-img")
    if reason:
        raise ResolveError(image.name, reason)
    argv = ("qemu-img", "info", "--output=json", f"--format={image.format}", "--")
    try:
        process = await launch(
            (*argv, image.what), stdout=PIPE, cpu_s=CPU_S, memory=MEMORY
        )
    except OSError as error:
        reason = f"qemu-img cannot be started: {error.strerror}"
        raise ResolveError(image.name, reason) from None
    try:
        async with timeout(LOOK_S_MAX):
            output, errors = await _outputs(process)
    except TimeoutError:
        raise ResolveError(
            image.name, f"`qemu-img info' did not end within {LOOK_S_MAX:.0f} s"
        ) from None
    finally:
        kill_all(process)
        await process.wait()
    if process.returncode:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        words = lines[0].removeprefix("qemu-img: ") if lines else ""
        reason = words or f"`qemu-img info' ended with status {process.returncode}"
        raise ResolveError(image.name, printable(reason, LINE_MAX))
    try:
        info = json.loads(output)
    except ValueError:
        info = None
    if not isinstance(info, dict):
        raise ResolveError(image.name, "`qemu-img info' did not print what it should")
    return info


async def _outputs(process: Process) -> tuple[bytes, bytes]:
    """Its output and its errors, up to a bound; then wait for its end."""
    assert process.stdout is not None
    assert process.stderr is not None
    output, errors = await asyncio.gather(
        _bounded(process.stdout), _bounded(process.stderr)
    )
    await process.wait()
    return output, errors


async def _bounded(stream: asyncio.StreamReader) -> bytes:
    """Read to the end, and keep the first OUTPUT_MAX bytes."""
    kept = bytearray()
    while data := await stream.read(1 << 16):
        kept += data[: OUTPUT_MAX - len(kept)]
    return bytes(kept)
