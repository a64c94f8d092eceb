# SPDX-License-Identifier: Apache-2.0
"""A server that has something of everything: a clone, a cache, a device that failed, clients, and names that are awkward."""

from pathlib import Path

from nbdtarget.control.figures import FiguresAnswer
from nbdtarget.monitor.observer import Observer
from nbdtarget.server.listener import Listener
from tests.support.peer import Peer
from tests.support.site import SIZE, Site, cache, clone

__all__ = ["AWKWARD", "Served"]

AWKWARD = 'a "quoted" \\ name'


class Served:
    """A site with an observer."""

    def __init__(self, folder: Path) -> None:
        self.site = Site(folder)
        self.certificates = {"/etc/pki/server-cert.pem": 1798761599.0}
        self.observer: Observer | None = None

    async def start(self) -> None:
        create = self.site.registry.create
        self.clone = await create("c", clone(self.site, bytes(SIZE)))
        self.cache = await create("k", cache(self.site, bytes(SIZE)))
        # Two disks of one name.
        table = "0 8 linear memory:4096 0\n8 8 linear memory:4096 0"
        await create(AWKWARD, table, uuid="U-1")
        await create("failed", None, failure="no such disk")
        self.peer = await self.attach("c")
        self.observer = Observer(
            self.site.registry, self.listener, lambda: self.certificates
        )

    @property
    def listener(self) -> Listener:
        assert self.site.listener is not None
        return self.site.listener

    async def attach(self, name: str) -> Peer:
        return await self.site.attach(name)

    async def figures(self, *names: str) -> FiguresAnswer:
        assert self.observer is not None
        return await self.observer.figures(names)

    async def metrics(self) -> str:
        assert self.observer is not None
        return (await self.observer.metrics()).decode()

    async def close(self) -> None:
        if self.observer is not None:
            self.observer.loop_lag.stop()
        await self.site.close()
