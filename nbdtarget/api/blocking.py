# SPDX-License-Identifier: Apache-2.0
"""`BlockingServer` and `BlockingDisk`: the twins of `Server` and `Disk` for programs without asyncio.

    with nbdtarget.BlockingServer() as server:
        disk = server.create("d", "powercut", size="1G")

Each method is made of its twin: it has the same arguments and the same description, runs the twin's coroutine on the loop of the server's thread, and
waits for it. A disk becomes a `BlockingDisk`.
"""

import inspect
from collections.abc import Callable, Coroutine, Mapping, Sequence
from types import TracebackType
from typing import Any, Concatenate, ParamSpec, TypeVar

from nbdtarget.api.disk import Disk
from nbdtarget.api.hosts import THREAD_NAME, OwnHost
from nbdtarget.api.loop_thread import LoopThread
from nbdtarget.api.nbd_client import NbdClient
from nbdtarget.api.server import Path, Server
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.paths import ControlAddress

__all__ = ["BlockingDisk", "BlockingServer"]

P = ParamSpec("P")
T = TypeVar("T")


def _of_disk(
    twin: Callable[Concatenate[Disk, P], Coroutine[Any, Any, T]],
) -> "Callable[Concatenate[BlockingDisk, P], T]":
    def run(self: "BlockingDisk", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return _run(self._thread, twin(self._disk, *args, **kwargs))

    _describe(run, twin)
    return run


def _of_server(
    twin: Callable[Concatenate[Server, P], Coroutine[Any, Any, Disk]],
) -> "Callable[Concatenate[BlockingServer, P], BlockingDisk]":
    def run(
        self: "BlockingServer", /, *args: P.args, **kwargs: P.kwargs
    ) -> "BlockingDisk":
        made = twin(self._server, *args, **kwargs)
        return self._blocking(_run(self._thread, made))

    _describe(run, twin)
    return run


def _describe(run: Callable[..., Any], twin: Callable[..., Any]) -> None:
    """Give `run` the name, text and signature of its twin, for `help` and `inspect`."""
    run.__name__, run.__doc__ = twin.__name__, twin.__doc__
    run.__qualname__ = f"Blocking{twin.__qualname__}"
    signature = inspect.signature(twin)
    if signature.return_annotation in (Disk, "Disk"):
        signature = signature.replace(return_annotation=BlockingDisk)
    run.__signature__ = signature  # type: ignore[attr-defined]  # what `inspect` looks at


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

    status = _of_disk(Disk.status)
    info = _of_disk(Disk.info)
    table = _of_disk(Disk.table)
    message = _of_disk(Disk.message)
    power_cut = _of_disk(Disk.power_cut)
    power_on = _of_disk(Disk.power_on)
    reset = _of_disk(Disk.reset)
    load = _of_disk(Disk.load)
    suspend = _of_disk(Disk.suspend)
    resume = _of_disk(Disk.resume)
    uncache = _of_disk(Disk.uncache)
    wait = _of_disk(Disk.wait)
    remove = _of_disk(Disk.remove)


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
            _run(self._thread, self._server.start())
        except (
            BaseException
        ):  # the start may be interrupted, and then no thread is left
            self._thread.close()
            raise

    def stop(self) -> None:
        if not self._thread.is_running:
            return
        try:
            _run(self._thread, self._server.stop())
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
        return [
            self._blocking(disk) for disk in _run(self._thread, self._server.disks())
        ]

    create = _of_server(Server.create)
    export = _of_server(Server.export)
    clone = _of_server(Server.clone)
    cache = _of_server(Server.cache)
    scratch = _of_server(Server.scratch)

    def _blocking(self, disk: Disk) -> BlockingDisk:
        return BlockingDisk(disk, self._thread)


def _run(thread: LoopThread, work: Coroutine[Any, Any, T]) -> T:
    if not thread.is_running:
        work.close()
        raise NbdTargetError(
            "the server is not running: use it inside of its with block"
        )
    return thread.run(work)
