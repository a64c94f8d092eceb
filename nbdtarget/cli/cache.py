# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget cache`: one line that puts a fast cache in front of a slow disk."""

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated

import typer

from nbdtarget.cli.common import AcceptOtherDisk, Control, Json, Moved
from nbdtarget.cli.logs import NO_LOG, Log
from nbdtarget.cli.network import NO_NETWORK, Network
from nbdtarget.cli.service import NO_SERVICE, Run, Service, check_run, takes_service
from nbdtarget.cli.sizes import block_size_option, maybe_size_option
from nbdtarget.common.named import alternatives
from nbdtarget.devices.registry import scheme_list
from nbdtarget.policies.registry import POLICY_TYPES

if TYPE_CHECKING:
    from nbdtarget.porcelain.cache import CacheOptions

__all__ = ["register"]


class Mode(StrEnum):
    """Where a write goes."""

    WRITETHROUGH = "writethrough"
    WRITEBACK = "writeback"
    PASSTHROUGH = "passthrough"


Origin = Annotated[
    str,
    typer.Argument(
        metavar="ORIGIN",
        help=f"Slow disk to serve: {scheme_list()}.",
    ),
]
Cache = Annotated[
    str,
    typer.Argument(
        metavar="CACHE",
        help="Fast disk: a block device, or a file; a missing file is made with --cache-size.",
    ),
]
ExportName = Annotated[
    str | None,
    typer.Option(
        "--name",
        metavar="EXPORT",
        help="Name of the export; default: the name of ORIGIN without its suffix.",
    ),
]
Metadata = Annotated[
    str | None,
    typer.Option(
        "--metadata",
        metavar="FILE",
        help="File that records which blocks are cached, and which of them are dirty; it is made if it"
        " is missing. Default: CACHE.nbdtarget.",
    ),
]
CacheSize = Annotated[
    str | None,
    typer.Option(
        "--cache-size",
        metavar="SIZE",
        help="Size of CACHE if it is missing and must be made, for example 10G.",
    ),
]
ModeOption = Annotated[
    Mode,
    typer.Option(
        "--mode",
        help="writethrough: writes go to both disks, and ORIGIN has everything at any time. writeback:"
        " faster; writes stay in CACHE for a while, so ORIGIN alone is incomplete. passthrough: reads"
        " come from ORIGIN, and a write drops the block from CACHE.",
    ),
]
PolicyOption = Annotated[
    str,
    typer.Option(
        "--policy",
        metavar="NAME",
        help="Policy that decides which blocks are cached:"
        f" {alternatives(POLICY_TYPES)}. mq is another name of smq; cleaner writes everything back"
        " and caches nothing new.",
    ),
]
BlockSize = Annotated[
    str,
    typer.Option(
        "--block-size",
        metavar="SIZE",
        help="Size of the blocks that are cached: 32K to 1G, a multiple of 32K.",
    ),
]
DirtyLog = Annotated[
    bool | None,
    typer.Option(
        "--dirty-log/--no-dirty-log",
        help="Record each block before it becomes dirty. After a crash only these blocks are written"
        " back, and not all cached ones. Default: only with --mode writeback.",
    ),
]
SortedWriteback = Annotated[
    bool,
    typer.Option(
        "--sorted-writeback",
        help="Write back in the order of ORIGIN while there is nothing else to do.",
    ),
]
MigrationRate = Annotated[
    str | None,
    typer.Option(
        "--migration-rate",
        metavar="SIZE",
        help="Most bytes a second that are copied between CACHE and ORIGIN, for example 100M; default:"
        " no limit.",
    ),
]
MigrationThreshold = Annotated[
    str | None,
    typer.Option(
        "--migration-threshold",
        metavar="SIZE",
        help="Most bytes of background copying in flight; default: the larger of 1M and eight blocks.",
    ),
]
Overwrite = Annotated[
    bool,
    typer.Option(
        "--overwrite", help="Start even though CACHE holds data. That data is lost."
    ),
]
Resize = Annotated[
    bool,
    typer.Option(
        "--resize", help="Accept that ORIGIN or CACHE has another size than before."
    ),
]


def register(app: typer.Typer) -> None:
    """Add the command."""
    app.command()(takes_service(cache))


def cache(
    origin: Origin,
    cache: Cache,
    name: ExportName = None,
    metadata: Metadata = None,
    cache_size: CacheSize = None,
    mode: ModeOption = Mode.WRITETHROUGH,
    policy: PolicyOption = "smq",
    block_size: BlockSize = "64K",
    dirty_log: DirtyLog = None,
    sorted_writeback: SortedWriteback = False,
    migration_rate: MigrationRate = None,
    migration_threshold: MigrationThreshold = None,
    overwrite: Overwrite = False,
    moved: Moved = False,
    accept_other_disk: AcceptOtherDisk = False,
    resize: Resize = False,
    service: Service = NO_SERVICE,
    run: Run = None,
    network: Network = NO_NETWORK,
    log: Log = NO_LOG,
    json: Json = False,
    control: Control = None,
) -> int:
    """Serve ORIGIN with a fast cache in front of it.

    CACHE keeps copies of what is used often. Ctrl-C stops it; run the same command again to continue. `nbdtarget uncache NAME' ends it for good.

    Example: nbdtarget cache /dev/slow cache.img --cache-size 10G
    """
    check_run(run, json=json)
    from nbdtarget.porcelain.cache import CacheOptions

    options = CacheOptions(
        origin=origin,
        cache=cache,
        name=name,
        metadata=metadata,
        cache_size=maybe_size_option("--cache-size", cache_size),
        mode=mode.value,
        policy=policy,
        block_size=block_size_option("--block-size", block_size),
        dirty_log=dirty_log,
        sorted_writeback=sorted_writeback,
        migration_rate=maybe_size_option("--migration-rate", migration_rate) or 0,
        migration_threshold=maybe_size_option(
            "--migration-threshold", migration_threshold
        ),
        listen=service.addresses,
        control=control,
        stop_timeout=service.stop_timeout,
        run=run,
        security=network.options(),
        sockets=service.sockets(),
        limits=service.limits(),
        metrics=service.metrics_options(),
        overwrite=overwrite,
        moved=moved,
        accept_other_disk=accept_other_disk,
        resize=resize,
    )
    return _run(options, log=log, json=json)


def _run(options: "CacheOptions", *, log: Log, json: bool) -> int:
    from nbdtarget.cli.progress.cache import cache_reporter
    from nbdtarget.daemon.process import run
    from nbdtarget.porcelain.cache import CacheJob

    log.start()
    with cache_reporter(options, json=json) as reporter:
        return run(lambda: CacheJob(options, reporter).run())
