# SPDX-License-Identifier: Apache-2.0
"""Options about where a clone's source is, and in which order it is copied."""

import shlex
from collections.abc import Callable
from typing import Annotated, Any, Final, NamedTuple, TypeVar

import typer

from nbdtarget.cli.option_group import takes_group
from nbdtarget.devices.helper.words import container_of

__all__ = ["NO_SOURCE_OPTIONS", "SourceSaid", "takes_source_options"]

C = TypeVar("C", bound=Callable[..., Any])

UrlCommand = Annotated[
    str | None,
    typer.Option(
        "--url-command",
        metavar="COMMAND",
        help="Command that prints the URL of SOURCE, for example one that signs it, or credentials for an object in S3. It"
        " runs at the start, and whenever the server does not accept them any more. It is not run by a shell.",
    ),
]

RecordTrace = Annotated[
    str | None,
    typer.Option(
        "--record-trace",
        metavar="FILE",
        help="File to record in which parts clients read, in the order of first reading.",
    ),
]
HydrateOrder = Annotated[
    str | None,
    typer.Option(
        "--hydrate-order",
        metavar="FILE",
        help="File that --record-trace has written for the same image: what it names is copied first.",
    ),
]

_URLS: Final = ("http://", "https://", "s3://")
_OPTIONS: Final[dict[str, tuple[Any, Any]]] = {
    "url_command": (UrlCommand, None),
    "record_trace": (RecordTrace, None),
    "hydrate_order": (HydrateOrder, None),
}


class SourceSaid(NamedTuple):
    """The values of these options."""

    url_command: str | None = None
    record_trace: str | None = None
    hydrate_order: str | None = None

    def url_words(self, source: str) -> tuple[str, ...]:
        """The words of the command for `source`; none: there is no command. Raises: typer.BadParameter."""
        if self.url_command is None:
            return ()
        if not container_of(source).lower().startswith(_URLS):
            raise typer.BadParameter("--url-command is for a SOURCE that is a URL")
        try:
            words = tuple(shlex.split(self.url_command))
        except ValueError as error:
            raise typer.BadParameter(f"--url-command: {error}") from None
        if not words:
            raise typer.BadParameter("--url-command names no program")
        return words


NO_SOURCE_OPTIONS: Final = SourceSaid()


def takes_source_options(command: C) -> C:
    """Give a command these options, in the place of its parameter `said`, which gets them as a `SourceSaid`."""
    return takes_group(command, "said", _OPTIONS, SourceSaid)
