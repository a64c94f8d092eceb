# SPDX-License-Identifier: Apache-2.0
"""`Server`: an NBD server of this program, or a running one, as an object whose methods are the verbs.

    async with nbdtarget.Server() as server:
        disk = await server.create("d", "powercut", size="1G")

The server runs in a thread with a loop of its own (`nbdtarget.api.loop_thread`), so it goes on while the program
blocks. `BlockingServer` is its twin for programs without asyncio (`nbdtarget.api.blocking`).
"""

import os
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Final

from nbdtarget.api.disk import Disk
from nbdtarget.api.hosts import Host, OwnHost, RunningHost
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.permissions import permissions
from nbdtarget.common.units import SECTOR, parse_size
from nbdtarget.common.words import join_words
from nbdtarget.control import messages as m
from nbdtarget.control.paths import ControlAddress, control_address, control_token
from nbdtarget.porcelain import look
from nbdtarget.porcelain.cache import CacheOptions, plan_cache
from nbdtarget.porcelain.clone import CloneOptions, plan_clone
from nbdtarget.porcelain.disk_name import disk_name
from nbdtarget.porcelain.job import Plan, make_missing, remove_made
from nbdtarget.porcelain.scratch import scratch_table
from nbdtarget.server.listener import export_uri

__all__ = ["Path", "Server", "Size", "table_line"]

Size = int | str
Path = str | os.PathLike[str]

# Targets whose arguments begin with one device and an offset, and those that stand on no device.
ON_ONE_DISK: Final = ("linear", "powercut", "delay", "flakey", "dust")
ON_NO_DISK: Final = ("zero", "error")


def table_line(
    target: str, size: int, disk: str | None, words: Sequence[str | int]
) -> str:
    """Return a table of one line. `words` are the arguments that follow device and offset.

    Raises: NbdTargetError: the target needs more than one disk, or none.
    """
    if size <= 0 or size % SECTOR:
        raise NbdTargetError(
            f"size {size}: must be more than 0 and a multiple of {SECTOR} bytes"
        )
    head: list[str] = []
    if target in ON_ONE_DISK:
        head = [f"memory:{size}" if disk is None else disk, "0"]
    elif target not in ON_NO_DISK:
        raise NbdTargetError(
            f"{target}: only {', '.join([*ON_ONE_DISK, *ON_NO_DISK])} can be made of a size and one disk:"
            " give a whole table, or use `clone` or `cache`"
        )
    elif disk is not None:
        raise NbdTargetError(f"{target}: stands on no disk: leave `disk` out")
    return (
        f"0 {size // SECTOR} {target} {join_words([*head, *map(str, words)])}".strip()
    )


def _bytes(what: str, size: Size) -> int:
    try:
        return size if isinstance(size, int) else parse_size(size)
    except ValueError as error:
        raise NbdTargetError(f"{what}: {error}") from None


class Server:
    """See the module head.

    Args:
        listen: addresses as of `nbdtarget serve --listen`; none: a unix socket in a directory of its own.
        limits: over the defaults of `nbdtarget.server.limits.Limits`.
        stop_timeout: seconds that a stop may take; 0: for ever; None: 60.
    Attributes:
        uris: where clients attach, with "{name}" for an export's name.
    """

    def __init__(
        self,
        *,
        listen: Sequence[str] = (),
        limits: Mapping[str, Any] | None = None,
        stop_timeout: float | None = None,
    ) -> None:
        self._host: Host = OwnHost(
            listen=listen, limits=limits, stop_timeout=stop_timeout
        )
        self.uris: tuple[str, ...] = ()

    @classmethod
    def connect(
        cls, control: Path | ControlAddress | None = None, *, token: str | None = None
    ) -> "Server":
        """Return a server that is running already, and goes on afterwards. Use it in `async with`, too.

        Args:
            control: a path or `tcp:HOST:PORT`; None: $NBDTARGET_CONTROL, or the `nbdtarget serve` of this user.
            token: of a control socket on TCP; None: $NBDTARGET_CONTROL_TOKEN.
        """
        given = None if control is None else str(control)
        host = RunningHost(control_address(given), token or control_token())
        return cls._on(host)

    @classmethod
    def _on(cls, host: Host) -> "Server":
        server = cls.__new__(cls)
        server._host = host
        server.uris = ()
        return server

    async def __aenter__(self) -> "Server":
        await self.start()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.stop()

    async def start(self) -> None:
        """Listen; or see that the running server answers. Raises: NbdTargetError."""
        await self._host.open()
        answer = await self._host.ask("version", m.Version(), m.VersionAnswer)
        self.uris = answer.uris

    async def stop(self) -> None:
        """End a server that was started here: finish requests, commit, close. A running one goes on. Idempotent.

        Raises: NbdTargetError: not everything could be committed.
        Durable: everything that had been acknowledged.
        """
        await self._host.close()

    @property
    def control(self) -> ControlAddress:
        """The control socket: what `nbdtarget --control` takes."""
        return self._host.control

    def disk(self, name: str) -> Disk:
        """Return the disk called `name`, which need not exist yet."""
        if not self.uris:
            raise NbdTargetError(
                "the server listens nowhere: use it inside of its with block"
            )
        return Disk(self._host, name, export_uri(self.uris[0], name))

    async def disks(self) -> list[Disk]:
        """Return all disks of the server. Raises: NbdTargetError."""
        answer = await self._host.ask("info", m.Info(), m.InfoAnswer)
        return [self.disk(line.name) for line in answer.devices]

    async def create(
        self,
        name: str,
        target: str = "linear",
        *words: str | int,
        size: Size | None = None,
        disk: Path | None = None,
        table: str | None = None,
        read_only: bool = False,
        overwrite: bool = False,
    ) -> Disk:
        """Create a disk, which is an export at once.

        Args:
            target: type of the only target; `words`: its arguments after device and offset, as in a table line.
            size: bytes, or for example "1G"; None: that of `disk`.
            disk: file, block device or URI below; None: memory, which is gone with the disk.
            table: a whole table, instead of all of these. Relative paths start in the current directory.
            overwrite: new metadata may be made where there is data.
        Raises: NbdTargetError: nothing is left of the disk.
        """
        if table is None:
            below = None if disk is None else _absolute(disk)
            if size is None and below is None:
                raise NbdTargetError(f"{name}: give `size`, `disk` or `table`")
            if size is None:
                assert below is not None
                nr_bytes = await self._host.look(
                    look.disk_size(below, read_only=read_only)
                )
            else:
                nr_bytes = _bytes("size", size)
            table = table_line(target, nr_bytes, below, words)
        elif size is not None or disk is not None or words:
            raise NbdTargetError(
                f"{name}: give either `table`, or a target with `size` and `disk`"
            )
        await self._create(name, table, read_only=read_only, overwrite=overwrite)
        return self.disk(name)

    async def _create(
        self,
        name: str,
        table: str,
        *,
        read_only: bool = False,
        overwrite: bool = False,
        moved: bool = False,
        accept_other_disk: bool = False,
    ) -> None:
        allowed = permissions(
            overwrite=overwrite, moved=moved, accept_other_disk=accept_other_disk
        )
        request = m.Create(
            name,
            table,
            readonly=read_only,
            directory=os.getcwd(),
            permissions=tuple(allowed),
        )
        await self._host.ask("create", request, m.Done)

    async def export(
        self, disk: Path, *, name: str | None = None, read_only: bool = False
    ) -> Disk:
        """Serve a disk as it is. `name`: None: that of the file. Raises: NbdTargetError."""
        found = look.export_name(name, _absolute(disk), "disk")
        return await self.create(found, disk=disk, read_only=read_only)

    async def clone(
        self,
        source: Path,
        dest: Path,
        *,
        name: str | None = None,
        metadata: Path | None = None,
        region_size: Size = "64K",
        hydration: bool = True,
        hydration_rate: Size = 0,
        hydrate_on_read: bool = False,
        then_linear: bool = False,
        overwrite: bool = False,
        moved: bool = False,
        accept_other_disk: bool = False,
    ) -> Disk:
        """Make `dest` a clone of `source`, as `nbdtarget clone` does; a missing file is made.

        Args: as the options of that command. `hydration_rate`: bytes a second.
        Raises: NbdTargetError: nothing has changed.
        """
        options = CloneOptions(
            source=os.fspath(source),
            dest=os.fspath(dest),
            name=name,
            metadata=None if metadata is None else os.fspath(metadata),
            region_size=_bytes("region_size", region_size),
            hydration=hydration,
            hydration_rate=_bytes("hydration_rate", hydration_rate),
            hydrate_on_read=hydrate_on_read,
            then_linear=then_linear,
        )
        plan = await self._host.look(plan_clone(options, os.getcwd()))
        return await self._serve(
            plan,
            overwrite=overwrite,
            moved=moved,
            accept_other_disk=accept_other_disk,
        )

    async def cache(
        self,
        origin: Path,
        cache: Path,
        *,
        name: str | None = None,
        metadata: Path | None = None,
        cache_size: Size | None = None,
        mode: str = "writethrough",
        policy: str = "smq",
        block_size: Size = "64K",
        overwrite: bool = False,
        moved: bool = False,
        accept_other_disk: bool = False,
    ) -> Disk:
        """Put a cache in front of `origin`, as `nbdtarget cache` does; a missing file is made.

        Args: as the options of that command.
        Raises: NbdTargetError: nothing has changed.
        """
        options = CacheOptions(
            origin=os.fspath(origin),
            cache=os.fspath(cache),
            name=name,
            metadata=None if metadata is None else os.fspath(metadata),
            cache_size=None if cache_size is None else _bytes("cache_size", cache_size),
            mode=mode,
            policy=policy,
            block_size=_bytes("block_size", block_size),
        )
        plan = await self._host.look(plan_cache(options, os.getcwd()))
        return await self._serve(
            plan,
            overwrite=overwrite,
            moved=moved,
            accept_other_disk=accept_other_disk,
        )

    async def scratch(
        self,
        image: Path,
        *,
        name: str,
        size_max: Size | None = None,
        store: Path | None = None,
    ) -> Disk:
        """Make a throw-away writable copy of `image`, which `Disk.reset` makes pristine again.

        Args:
            size_max: bytes that may be written to it; None: as many as the image has.
            store: an empty file or device as large as the image, for what is written; None: memory.
        Raises: NbdTargetError: nothing is left of the disk.
        """
        below = _absolute(image)
        size = await self._host.look(look.disk_size(below, read_only=True))
        held = f"memory:{size}" if store is None else _absolute(store)
        bound = size if size_max is None else _bytes("size_max", size_max)
        await self._create(name, scratch_table(below, size, held, bound))
        return self.disk(name)

    async def _serve(
        self, plan: Plan, *, overwrite: bool, moved: bool, accept_other_disk: bool
    ) -> Disk:
        made = await self._host.look(make_missing(plan))
        try:
            await self._create(
                plan.name,
                plan.table,
                overwrite=overwrite,
                moved=moved,
                accept_other_disk=accept_other_disk,
            )
        except (
            BaseException
        ):  # it may be cancelled, and then the file that was made is removed
            await self._host.look(remove_made(made))
            raise
        return self.disk(plan.name)


def _absolute(disk: Path) -> str:
    return disk_name(os.fspath(disk), os.getcwd())
