# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget cache`: one line that puts a cache under a slow disk."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import AcceptOtherDisk, Control, Json, Moved
from nbdtarget.cli.serve import (
    ControlGroup,
    ControlMode,
    ControlOwner,
    Listen,
    SocketGroup,
    SocketMode,
    SocketOwner,
    StopTimeout,
)
from nbdtarget.cli.sizes import block_size_option, maybe_size_option
from nbdtarget.common.named import alternatives
from nbdtarget.policies.registry import POLICY_TYPES

if TYPE_CHECKING:
    from nbdtarget.porcelain.cache import CacheOptions

__all__ = ["register"]


class Mode(StrEnum):
    """What becomes of a write."""

    WRITETHROUGH = "writethrough"
    WRITEBACK = "writeback"
    PASSTHROUGH = "passthrough"


Origin = Annotated[
    str, typer.Argument(metavar="ORIGIN", help="The slow disk: a path or an NBD URI.")
]
Cache = Annotated[
    str,
    typer.Argument(
        metavar="CACHE", help="The fast disk; a missing file is made of --cache-size."
    ),
]
ExportName = Annotated[
    str | None,
    typer.Option("--name", metavar="N", help="Export name; default: from ORIGIN."),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="What CACHE holds; default: CACHE.nbdtarget. Made if missing.",
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option("--cache-size", metavar="SIZE", help="Of a CACHE that is missing."),
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="writethrough: ORIGIN has everything at any time; writeback: faster, and"
        " ORIGIN alone is not the disk; passthrough: CACHE is given up bit by bit.",
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy", metavar="NAME", help=f"Cache policy: {alternatives(POLICY_TYPES)}."
    ),
]
BlockSize = Annotated[
    str,
    typer.Option("--block-size", metavar="SIZE", help="32K to 1G, in steps of 32K."),
]
DirtyLog = Annotated[
    bool | None,
    typer.Option(
        "--dirty-log/--no-dirty-log",
        help="Record blocks before they turn dirty, so that a crash does not leave all"
        " of them dirty; default: with writeback.",
    ),
]
SortedWriteback = Annotated[
    bool,
    typer.Option("--sorted-writeback", help="Write back in the order of ORIGIN."),
]
MigrationRate = Annotated[
    str | None,
    typer.Option(
        "--migration-rate",
        metavar="SIZE",
        help="Bytes a second that migrations copy at most, as 100M.",
    ),
]
MigrationThreshold = Annotated[
    str | None,
    typer.Option(
        "--migration-threshold",
        metavar="SIZE",
        help="Bytes that idle writeback has under way at most; default: 1M, or what"
        " eight blocks need.",
    ),
]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Start anew over data that CACHE holds.")
]
Resize = Annotated[
    bool,
    typer.Option(
        "--resize", help="ORIGIN or CACHE has been resized since it was cached."
    ),
]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens.")]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(cache)


def cache(
    origin: Origin,
    cache: Cache,
    name: ExportName = None,
    metadata: Metadata = None,
    cache_size: CacheSize = None,
    mode: ModeOption = Mode.WRITETHROUGH,
    policy: PolicyOption = "smq",
    block_size: BlockSize = "64K",
    listen: Listen = None,
    dirty_log: DirtyLog = None,
    sorted_writeback: SortedWriteback = False,
    migration_rate: MigrationRate = None,
    migration_threshold: MigrationThreshold = None,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    resize: Resize = False,
    socket_mode: SocketMode = None,
    socket_owner: SocketOwner = None,
    socket_group: SocketGroup = None,
    control_mode: ControlMode = None,
    control_owner: ControlOwner = None,
    control_group: ControlGroup = None,
    stop_timeout: StopTimeout = None,
    verbose: Verbose = False,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve ORIGIN, and keep what is used often in CACHE, too.

    Stop it at any time; the same line goes on where it was. `uncache` ends it for good.
    """
    block_bytes = block_size_option("--block-size", block_size)
    from nbdtarget.common.unix_socket import SocketOptions
    from nbdtarget.porcelain.cache import CacheOptions

    options = CacheOptions(
        origin=origin,
        cache=cache,
        name=name,
        metadata=metadata,
        cache_size=maybe_size_option("--cache-size", cache_size),
        mode=mode.value,
        policy=policy,
        block_size=block_bytes,
        dirty_log=dirty_log,
        sorted_writeback=sorted_writeback,
        migration_rate=maybe_size_option("--migration-rate", migration_rate) or 0,
        migration_threshold=maybe_size_option(
            "--migration-threshold", migration_threshold
        ),
        listen=tuple(listen or ()),
        control=control,
        stop_timeout=stop_timeout,
        sockets=SocketOptions(
            socket_mode,
            socket_owner,
            socket_group,
            control_mode,
            control_owner,
            control_group,
        ),
        overwrite=overwrite,
        moved=moved,
        accept_other_disk=accept_other_disk,
        resize=resize,
    )
    return _run(options, verbose=verbose, json=json)


def _run(options: "CacheOptions", *, verbose: bool, json: bool) -> int:
    from nbdtarget.cli.logs import start_logging
    from nbdtarget.cli.progress.cache import cache_reporter
    from nbdtarget.daemon.daemon import run
    from nbdtarget.porcelain.cache import CacheJob

    start_logging(verbose=verbose)
    with cache_reporter(options, json=json) as reporter:
        return run(lambda: CacheJob(options, reporter).run())
