# SPDX-License-Identifier: Apache-2.0
"""Commands that print the URL of an image anew, because signed URLs live for minutes and a copy may take hours.

A command is an argument list that the configuration file or the command line gives for one URL, never a table line or
a message: what may load tables must not thereby be able to start programs. It is started without a shell, and prints
one URL. It runs when the image is opened, and when the server does not accept the URL any more.
"""

import asyncio
import contextlib
import logging
import os
import signal
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final

from nbdtarget.common.clock import timeout
from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http.url import URL_MAX, HttpUrl, parse_http_url
from nbdtarget.devices.ranged.store import SourceAway

__all__ = ["run_url_command", "set_url_commands", "url_command_for"]

COMMAND_S_MAX: Final = 30.0
KILLED_S_MAX: Final = 5.0
PRINTED_MAX: Final = (
    URL_MAX + 2
)  # bytes that are read; a URL and the end of its line are shorter

log = logging.getLogger(__name__)

# By the URL's place, which has no secrets. A process has one configuration, so there is one of these.
_commands: dict[str, tuple[str, ...]] = {}


def set_url_commands(commands: Mapping[str, Sequence[str]]) -> None:
    """Set the commands of this process, by the URL of the image that each is for. Raises: ResolveError: no URL."""
    new = {parse_http_url(url).place: tuple(words) for url, words in commands.items()}
    _commands.clear()
    _commands.update(new)


def url_command_for(url: HttpUrl) -> tuple[str, ...]:
    """Return the command for an image; empty: there is none."""
    return _commands.get(url.place, ())


async def run_url_command(command: Sequence[str], url: HttpUrl) -> HttpUrl:
    """Run the command and return the URL that it prints; the options of `url` stay. Raises: SourceAway."""
    program = command[0]
    try:
        async with timeout(COMMAND_S_MAX):
            output, status = await _run(command)
    except TimeoutError:
        reason = f"the command {program} did not end within {COMMAND_S_MAX:.0f} s"
        raise SourceAway(reason) from None
    except OSError as error:
        raise SourceAway(
            f"the command {program} cannot be run: {error.strerror}"
        ) from error
    if status:
        raise SourceAway(f"the command {program} ended with status {status}")
    text = output.decode("ascii", "replace").strip()
    try:
        new = parse_http_url(text)
    except ResolveError:
        # What it printed may hold a secret, so it is not shown.
        raise SourceAway(f"what the command {program} printed is not one URL") from None
    if not text.lower().startswith(("http://", "https://")):
        raise SourceAway(f"what the command {program} printed is not one URL")
    return replace(new, options=url.options)


async def _run(command: Sequence[str]) -> tuple[bytes, int]:
    """Return what the command prints, and its exit status. It is killed if it prints too much, or if this is cancelled."""
    process = await asyncio.create_subprocess_exec(
        *command, stdin=DEVNULL, stdout=PIPE, start_new_session=True
    )
    printed = process.stdout
    assert printed is not None
    try:
        output = await printed.readexactly(PRINTED_MAX)
    except asyncio.IncompleteReadError as error:  # the usual case: it has printed less
        return error.partial, await process.wait()
    else:
        return output, 0
    finally:
        if process.returncode is None or not printed.at_eof():
            await _kill(process, printed)


async def _kill(process: Process, printed: asyncio.StreamReader) -> None:
    """Kill a command and all that it has started in its session."""
    with contextlib.suppress(ProcessLookupError):  # it has just ended
        os.killpg(process.pid, signal.SIGKILL)
    try:
        async with timeout(KILLED_S_MAX):
            # asyncio waits for the end of the pipe as well.
            while await printed.read(PRINTED_MAX):
                pass
            await process.wait()
    except TimeoutError:
        log.warning("process %d was killed and does not end", process.pid)
