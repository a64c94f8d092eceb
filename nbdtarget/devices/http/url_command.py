# SPDX-License-Identifier: Apache-2.0
"""Commands that print the URL of an image anew, because signed URLs live for minutes and a copy may take hours.

A command is an argument list that the configuration file or the command line gives for one URL, never a table line or
a message: what may load tables must not thereby be able to start programs. It is started without a shell, and prints
one URL. It runs when the image is opened, and when the server does not accept the URL any more.
"""

import asyncio
import contextlib
import logging
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
    process: Process | None = None
    try:
        async with timeout(COMMAND_S_MAX):
            process = await asyncio.create_subprocess_exec(
                *command, stdin=DEVNULL, stdout=PIPE
            )
            output, _ = await process.communicate()
    except TimeoutError:
        assert process is not None
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            process.kill()
        await process.wait()
        reason = f"the command {program} did not end within {COMMAND_S_MAX:.0f} s"
        raise SourceAway(reason) from None
    except OSError as error:
        raise SourceAway(
            f"the command {program} cannot be run: {error.strerror}"
        ) from error
    if process.returncode:
        raise SourceAway(
            f"the command {program} ended with status {process.returncode}"
        )
    text = output[: URL_MAX + 1].decode("ascii", "replace").strip()
    try:
        new = parse_http_url(text)
    except ResolveError:
        # What it printed may hold a secret, so it is not shown.
        raise SourceAway(f"what the command {program} printed is not one URL") from None
    if not text.lower().startswith(("http://", "https://")):
        raise SourceAway(f"what the command {program} printed is not one URL")
    return replace(new, options=url.options)
