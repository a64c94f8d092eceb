# SPDX-License-Identifier: Apache-2.0
"""A look by a program that prints JSON and ends: `qemu-img info`, `rbd info`.

It is started as a helper is, without a shell, and bounded in CPU time, time and output, because what it looks at may be made to cost much.
"""

import asyncio
from asyncio.subprocess import PIPE, Process
from collections.abc import Sequence
from typing import Final

import msgspec

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.common.words import printable
from nbdtarget.devices.helper.process import LINE_MAX, kill_all, launch
from nbdtarget.devices.helper.programs import missing

__all__ = ["look"]

CPU_S: Final = 30
LOOK_S_MAX: Final = 60.0
OUTPUT_MAX: Final = 1 << 20


async def look(
    name: str,
    argv: Sequence[str],
    shown: str,
    *,
    fds: Sequence[int] = (),
    memory: int = 0,
) -> object:
    """Return what a program prints, decoded from JSON.

    Args:
        name: of the disk, for errors.
        shown: the command, for errors.
        fds: descriptors that it gets, under the same numbers.
        memory: bytes that it may have; 0: any.

    Raises: ResolveError: it is missing, it fails (with its first line), or does not end, or prints something else.
    """
    program = argv[0]
    if reason := missing(program):
        raise ResolveError(name, reason)
    try:
        process = await launch(argv, stdout=PIPE, cpu_s=CPU_S, memory=memory, fds=fds)
    except OSError as error:
        reason = f"{program} cannot be started: {error.strerror}"
        raise ResolveError(name, reason) from None
    try:
        async with timeout(LOOK_S_MAX):
            output, errors = await _outputs(process)
    except TimeoutError:
        reason = f"`{shown}' did not end within {LOOK_S_MAX:.0f} s"
        raise ResolveError(name, reason) from None
    finally:
        kill_all(process)
        await process.wait()
    if process.returncode:
        lines = errors.decode("utf-8", "replace").strip().splitlines()
        words = lines[0].removeprefix(f"{program}: ") if lines else ""
        reason = words or f"`{shown}' ended with status {process.returncode}"
        raise ResolveError(name, printable(reason, LINE_MAX))
    try:
        return msgspec.json.decode(output)
    except msgspec.DecodeError:
        reason = f"`{shown}' did not print what it should"
        raise ResolveError(name, reason) from None


async def _outputs(process: Process) -> tuple[bytes, bytes]:
    """Read the output and the errors of a program, up to a bound; then wait for its end."""
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
