# SPDX-License-Identifier: Apache-2.0
"""A server over real files, for tests of the way from the socket to a file."""

from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.common.tls_context import client_context
from nbdtarget.devices import resolve
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.fast.compiled import FastFile
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import NO_TLS, ListenerTls, TlsOptions
from tests.support.certificates import authority
from tests.support.peer import Peer

__all__ = [
    "ALL_MISS",
    "BLOCK",
    "SECTORS",
    "SIZE",
    "TABLES",
    "Site",
    "cache",
    "clone",
    "force_misses",
    "linear",
]

ALL_MISS: Final = (1 << 32) - 1

SIZE: Final = 4 << 20
SECTORS: Final = SIZE // 512
BLOCK: Final = 64 << 10


class Site:
    """The files of one test, a registry and a listener.

    Args: tls: whether clients talk in TLS.
    """

    def __init__(self, folder: Path, *, tls: bool = False) -> None:
        self.tls = tls
        self.folder = folder
        self.registry = Registry(resolve)
        self.limits = Limits(poison_borrowed=True)
        self.listener: Listener | None = None
        self.peers: list[Peer] = []

    def file(self, name: str, content: bytes) -> str:
        path = self.folder / name
        path.write_bytes(content)
        return str(path)

    def nr_in_flight(self) -> int:
        """How many requests of all clients are in flight."""
        assert self.listener is not None
        assert self.listener.budget is not None
        return self.listener.budget.nr_requests

    async def attach(
        self, name: str = "", *, structured: bool = True, extended: bool = False
    ) -> Peer:
        if self.listener is None:
            tls = NO_TLS
            if self.tls:
                tls = ListenerTls(TlsOptions("require", str(authority()[1])))
            self.listener = Listener(self.registry, limits=self.limits, tls=tls)
            await self.listener.start(f"unix:{self.folder}/s")
        peer = await Peer.connect(self.folder / "s")
        self.peers.append(peer)
        context = client_context(str(authority()[1])) if self.tls else None
        await peer.attach(name, structured=structured, extended=extended, tls=context)
        return peer

    async def close(self) -> None:
        for peer in self.peers:
            peer.close()
        if self.listener is not None:
            await self.listener.close()
        await self.registry.close()


# ---- tables; each is the same disk of random bytes at the beginning ----


def linear(site: Site, content: bytes) -> str:
    disk = site.file("disk", b"x" * 4096 + content)
    return f"0 {SECTORS} linear {disk} 8"


def stacked(site: Site, content: bytes) -> str:
    """One target on another: not a file, as far as the upper device knows."""
    disk = site.file("disk", content)
    half = SECTORS // 2
    return f"0 {half} linear {disk} 0\n{half} {half} linear {disk} {half}"


def clone(site: Site, content: bytes) -> str:
    source = site.file("source", content)
    site.file("dest", bytes(SIZE))
    names = f"{site.folder}/clone.meta {site.folder}/dest {source}"
    return f"0 {SECTORS} clone {names} {BLOCK // 512} 0 4 hydration_threshold 1 hydration_batch_size 1"


def cache(site: Site, content: bytes) -> str:
    origin = site.file("origin", content)
    site.file("fast", bytes(SIZE // 2))
    names = f"{site.folder}/cache.meta {site.folder}/fast {origin}"
    return f"0 {SECTORS} cache {names} {BLOCK // 512} 1 writeback smq 0"


TABLES: Final[dict[str, Callable[[Site, bytes], str]]] = {
    "linear": linear,
    "two targets": stacked,
    "clone": clone,
    "cache": cache,
}


def force_misses(monkeypatch: pytest.MonkeyPatch, share: int = ALL_MISS) -> None:
    """Let the compiled fast path take so many of 2^32 READs for misses of the page cache."""
    real = FileDevice.maybe_fast_file

    def maybe_fast_file(device: FileDevice) -> FastFile | None:
        file = real(device)
        if file is not None:
            file.fake_misses = share
        return file

    monkeypatch.setattr(FileDevice, "maybe_fast_file", maybe_fast_file)
