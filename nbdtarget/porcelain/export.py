# SPDX-License-Identifier: Apache-2.0
"""One line for one job: `nbdtarget export` serves one disk as it is.

The disk is a file, a block device or an export of another NBD server. The table is one line, `linear` on the
whole of it: nothing is copied, nothing is recorded, and a FLUSH of a client is a flush of the disk. How the job goes, and
how it is undone, is in job.py.

What is refused: a disk that is missing, that is in use by another process, or whose size is not a multiple of a sector.
"""

import os
from typing import Any

import msgspec

from nbdtarget.common.permissions import permissions
from nbdtarget.common.units import SECTOR
from nbdtarget.common.unix_socket import SocketOptions
from nbdtarget.common.words import join_words
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.security import SecurityOptions
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.names import check_name
from nbdtarget.porcelain import job, look
from nbdtarget.porcelain.disk_name import disk_name

__all__ = ["ExportJob", "ExportOptions", "ExportPlan", "plan_export"]


class ExportOptions(msgspec.Struct, frozen=True, kw_only=True):
    """The options of the command; names as they were written.

    Args:
        name: the name of the export; None: from the disk's name.
        read_only: clients may not write, and the disk is opened for reading only.
        listen: addresses; none: a unix socket in the runtime directory.
        control: path of the control socket; None: the one called after the export.
        stop_timeout: seconds that a stop may take; 0: for ever; None: the default.
        sockets: modes, owners and groups.
        limits: bounds of the server, by name.
        metrics: where metrics are told alone.
        run: a shell command that runs while the disk is served; its end is the end of the server.
        security: TLS, and who may attach.
    """

    disk: str
    name: str | None = None
    read_only: bool = False
    listen: tuple[str, ...] = ()
    control: str | None = None
    stop_timeout: float | None = None
    sockets: SocketOptions = SocketOptions()
    limits: dict[str, Any] = {}
    metrics: MetricsOptions = MetricsOptions()
    run: str | None = None
    security: SecurityOptions = SecurityOptions()


class ExportPlan(msgspec.Struct, frozen=True, kw_only=True):
    """The plan of a job. Nothing is ever created."""

    name: str
    size: int
    table: str

    @property
    def missing(self) -> None:
        return None


async def plan_export(options: ExportOptions, directory: str) -> ExportPlan:
    """Look at everything, change nothing.

    Args: directory: absolute; where relative paths are meant.
    Raises: NbdTargetError.
    """
    disk = disk_name(options.disk, directory)
    name = look.export_name(options.name, disk, "disk")
    check_name(name)
    size = await look.disk_size(disk, read_only=options.read_only)
    await look.warn_of_image(disk, read_only=options.read_only)
    table = f"0 {size // SECTOR} linear {join_words([disk])} 0"
    return ExportPlan(name=name, size=size, table=table)


class ExportJob(job.Job[ExportPlan]):
    """Prepares, serves and ends one export, in this process."""

    plan_type = ExportPlan

    def __init__(
        self, options: ExportOptions, reporter: job.Reporter[ExportPlan]
    ) -> None:
        super().__init__(
            reporter,
            listen=options.listen,
            control=options.control,
            stop_timeout=options.stop_timeout,
            sockets=options.sockets,
            limits=options.limits,
            metrics=options.metrics,
            command=options.run,
            security=options.security,
            permissions=permissions(),
            read_only=options.read_only,
        )
        self._options = options

    async def _plan(self) -> ExportPlan:
        return await plan_export(self._options, os.getcwd())

    async def _watch(self, device: MappedDevice, plan: ExportPlan) -> None:
        """Do nothing: an export has no progress."""
