# SPDX-License-Identifier: Apache-2.0
"""`BlockingServer` and `BlockingDisk`: the twins of `Server` and `Disk` for programs without asyncio.

    with nbdtarget.BlockingServer() as server:
        disk = server.create("d", "powercut", size="1G")

Each method runs its twin's coroutine on the loop of the server's thread, and waits for it. A test holds the signatures of
the twins together.
"""

from collections.abc import Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

from nbdtarget.api.disk import Disk, DiskStatus, PowerCut
from nbdtarget.api.hosts import THREAD_NAME, OwnHost
from nbdtarget.api.loop_thread import LoopThread
from nbdtarget.api.nbd_client import NbdClient
from nbdtarget.api.server import Path, Server, Size
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.messages import InfoLine
from nbdtarget.control.paths import ControlAddress

__all__ = ["BlockingDisk", "BlockingServer"]

T = TypeVar("T")


class BlockingDisk:
    """See `nbdtarget.api.disk.Disk`, method by method."""

    def __init__(self, disk: Disk, thread: LoopThread) -> None:
        self._disk = disk
        self._thread = thread
        self.name = disk.name
        self.uri = disk.uri

    def __repr__(self) -> str:
        return f"<BlockingDisk {self.name} {self.uri}>"

    def connect(self, *, timeout_s: float = 30.0) -> NbdClient:
        return self._disk.connect(timeout_s=timeout_s)

    def status(self, *, noflush: bool = False) -> DiskStatus:
        return self._run(self._disk.status(noflush=noflush))

    def info(self) -> InfoLine:
        return self._run(self._disk.info())

    def table(self) -> str:
        return self._run(self._disk.table())

    def message(self, *words: str | int, sector: int = 0) -> str | None:
        return self._run(self._disk.message(*words, sector=sector))

    def power_cut(
        self,
        fate: str = "drop",
        *,
        tear: int | None = None,
        mixed: int | None = None,
        stay_off: bool = False,
    ) -> PowerCut:
        return self._run(
            self._disk.power_cut(fate, tear=tear, mixed=mixed, stay_off=stay_off)
        )

    def power_on(self) -> None:
        self._run(self._disk.power_on())

    def reset(self) -> None:
        self._run(self._disk.reset())

    def load(self, table: str, *, keep_open: bool = True) -> None:
        self._run(self._disk.load(table, keep_open=keep_open))

    def suspend(self, *, noflush: bool = False) -> None:
        self._run(self._disk.suspend(noflush=noflush))

    def resume(self) -> None:
        self._run(self._disk.resume())

    def wait(self, event_nr: int | None = None) -> int:
        return self._run(self._disk.wait(event_nr))

    def remove(self, *, force: bool = False) -> None:
        self._run(self._disk.remove(force=force))

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return _run(self._thread, work)


class BlockingServer:
    """See `nbdtarget.api.server.Server`, method by method."""

    def __init__(
        self,
        *,
        listen: Sequence[str] = (),
        limits: Mapping[str, Any] | None = None,
        stop_timeout: float | None = None,
    ) -> None:
        self._thread = LoopThread(THREAD_NAME)
        host = OwnHost(
            listen=listen,
            limits=limits,
            stop_timeout=stop_timeout,
            thread=self._thread,
        )
        self._server = Server._on(host)

    @classmethod
    def connect(
        cls, control: Path | ControlAddress | None = None, *, token: str | None = None
    ) -> "BlockingServer":
        server = cls.__new__(cls)
        server._thread = LoopThread(THREAD_NAME)
        server._server = Server.connect(control, token=token)
        return server

    def __enter__(self) -> "BlockingServer":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._thread.start()
        try:
            self._run(self._server.start())
        except (
            BaseException
        ):  # the start may be interrupted, and then no thread is left
            self._thread.close()
            raise

    def stop(self) -> None:
        if not self._thread.is_running:
            return
        try:
            self._run(self._server.stop())
        finally:
            self._thread.close()

    @property
    def uris(self) -> tuple[str, ...]:
        return self._server.uris

    @property
    def control(self) -> ControlAddress:
        return self._server.control

    def disk(self, name: str) -> BlockingDisk:
        return self._blocking(self._server.disk(name))

    def disks(self) -> list[BlockingDisk]:
        return [self._blocking(disk) for disk in self._run(self._server.disks())]

    def create(
        self,
        name: str,
        target: str = "linear",
        *words: str | int,
        size: Size | None = None,
        disk: Path | None = None,
        table: str | None = None,
        read_only: bool = False,
        overwrite: bool = False,
    ) -> BlockingDisk:
        made = self._server.create(
            name,
            target,
            *words,
            size=size,
            disk=disk,
            table=table,
            read_only=read_only,
            overwrite=overwrite,
        )
        return self._blocking(self._run(made))

    def export(
        self, disk: Path, *, name: str | None = None, read_only: bool = False
    ) -> BlockingDisk:
        made = self._server.export(disk, name=name, read_only=read_only)
        return self._blocking(self._run(made))

    def clone(
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
    ) -> BlockingDisk:
        made = self._server.clone(
            source,
            dest,
            name=name,
            metadata=metadata,
            region_size=region_size,
            hydration=hydration,
            hydration_rate=hydration_rate,
            hydrate_on_read=hydrate_on_read,
            then_linear=then_linear,
            overwrite=overwrite,
            moved=moved,
            accept_other_disk=accept_other_disk,
        )
        return self._blocking(self._run(made))

    def cache(
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
    ) -> BlockingDisk:
        made = self._server.cache(
            origin,
            cache,
            name=name,
            metadata=metadata,
            cache_size=cache_size,
            mode=mode,
            policy=policy,
            block_size=block_size,
            overwrite=overwrite,
            moved=moved,
            accept_other_disk=accept_other_disk,
        )
        return self._blocking(self._run(made))

    def scratch(
        self,
        image: Path,
        *,
        name: str,
        size_max: Size | None = None,
        store: Path | None = None,
    ) -> BlockingDisk:
        made = self._server.scratch(image, name=name, size_max=size_max, store=store)
        return self._blocking(self._run(made))

    def _blocking(self, disk: Disk) -> BlockingDisk:
        return BlockingDisk(disk, self._thread)

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        return _run(self._thread, work)


def _run(thread: LoopThread, work: Coroutine[Any, Any, T]) -> T:
    if not thread.is_running:
        work.close()
        raise NbdTargetError(
            "the server is not running: use it inside of its with block"
        )
    return thread.run(work)
