# SPDX-License-Identifier: Apache-2.0
"""Commands that print the URL of an image anew, because signed URLs live for minutes and a copy may take hours.

A command is an argument list that the configuration file or the command line gives for one URL, never a table line or
a message: what may load tables must not thereby be able to start programs. It is started without a shell, and prints
one URL. It runs when the image is opened, and when the server does not accept the URL any more. For an object in S3 it prints
credentials instead (`nbdtarget.devices.objects.credentials`).
"""

import asyncio
import contextlib
import logging
import os
import re
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.url import URL_MAX, HttpUrl, parse_http_url
from nbdtarget.devices.ranged.store import SourceAway

__all__ = [
    "check_url",
    "command_output",
    "run_url_command",
    "set_url_commands",
    "url_command_for",
]

COMMAND_S_MAX: Final = 30.0
KILLED_S_MAX: Final = 5.0
DRAIN_BYTES: Final = 64 << 10
_HTTP: Final = re.compile(r"https?://", re.IGNORECASE)

log = logging.getLogger(__name__)

# By the URL's place, which has no secrets. A process has one configuration, so there is one of these.
_commands: dict[str, tuple[str, ...]] = {}


def set_url_commands(commands: Mapping[str, Sequence[str]]) -> None:
    """Set the commands of this process, by the URL of the image that each is for. Raises: ResolveError: no URL."""
    new = {_place(url): tuple(words) for url, words in commands.items()}
    _commands.clear()
    _commands.update(new)


def url_command_for(place: str) -> tuple[str, ...]:
    """Return the command for an image, by its URL without query and options; empty: there is none."""
    return _commands.get(place, ())


def check_url(url: str) -> None:
    """Refuse what no command can be for. Raises: ResolveError."""
    _place(url)


def _place(url: str) -> str:
    """Raises: ResolveError."""
    if _HTTP.match(url):
        return parse_http_url(url).place
    if not url.startswith("s3://"):
        raise ResolveError(url, "a command can be for https://, http:// and s3://")
    return url.partition("#")[0]


async def run_url_command(command: Sequence[str], url: HttpUrl) -> HttpUrl:
    """Run the command and return the URL that it prints; the options of `url` stay. Raises: SourceAway."""
    output = await command_output(command, URL_MAX + 2)
    text = output.decode("ascii", "replace").strip()
    # The output may hold a secret, so it is not shown.
    wrong = f"what the command {command[0]} printed is not one URL"
    if not _HTTP.match(text):
        raise SourceAway(wrong)
    try:
        new = parse_http_url(text)
    except ResolveError:
        raise SourceAway(wrong) from None
    return replace(new, options=url.options)


async def command_output(command: Sequence[str], length_max: int) -> bytes:
    """Run a command and return what it prints, cut behind `length_max` bytes. Raises: SourceAway."""
    program = command[0]
    try:
        async with timeout(COMMAND_S_MAX):
            output, status = await _run(command, length_max)
    except TimeoutError:
        reason = f"the command {program} did not end within {COMMAND_S_MAX:.0f} s"
        raise SourceAway(reason) from None
    except OSError as error:
        raise SourceAway(
            f"the command {program} cannot be run: {error.strerror}"
        ) from error
    if status:
        raise SourceAway(f"the command {program} ended with status {status}")
    return output


async def _run(command: Sequence[str], length_max: int) -> tuple[bytes, int]:
    """Return what the command prints, and its exit status. It is killed if it prints too much, or if this is cancelled."""
    process = await _start(command)
    printed = process.stdout
    assert printed is not None
    try:
        output = await printed.readexactly(length_max)
    except asyncio.IncompleteReadError as error:  # the usual case: it has printed less
        return error.partial, await process.wait()
    else:
        return output, 0
    finally:
        if process.returncode is None or not printed.at_eof():
            await _kill(process, printed)


async def _start(command: Sequence[str]) -> Process:
    """Start a command; if this is cancelled meanwhile, the command is killed before it returns."""
    starting = asyncio.ensure_future(
        asyncio.create_subprocess_exec(
            *command, stdin=DEVNULL, stdout=PIPE, start_new_session=True
        )
    )
    try:
        # asyncio would forget what a process that it has just started has started itself.
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        process = await starting
        assert process.stdout is not None
        await _kill(process, process.stdout)
        raise


async def _kill(process: Process, printed: asyncio.StreamReader) -> None:
    """Kill a command and all that it has started in its session."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with timeout(KILLED_S_MAX):
            # asyncio waits for the end of the pipe as well.
            while await printed.read(DRAIN_BYTES):
                pass
            await process.wait()
    except TimeoutError:
        log.warning("process %d was killed and does not end", process.pid)
