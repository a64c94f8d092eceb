# SPDX-License-Identifier: Apache-2.0
"""The parts of a cache on devices in memory, without the target that they make up."""

from array import array
from collections.abc import Iterable

from nbdtarget.bio import Bio
from nbdtarget.devices.memory import MemoryDevice
from nbdtarget.targets import metadata_io
from nbdtarget.targets.cache.activation import Activation
from nbdtarget.targets.cache.blocks import Blocks
from nbdtarget.targets.cache.constructor import Parts, construct
from nbdtarget.targets.committer import Committer
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.cache.superblock import PolicyIdentity
from tests.support.clock import SimClock
from tests.support.clone import Context
from tests.support.spy import Spy

__all__ = ["BLOCK", "SECTORS", "Bench", "Table"]

BLOCK = 32 << 10
SECTORS = BLOCK // 512
METADATA_SIZE = 4 << 20  # 1024 blocks, as in the recordings


class Bench:
    """A metadata, a cache and an origin device called m, c and o; tables go onto them.

    Attributes:
        log: (device, operation, offset, length) of all I/O, in order.
    """

    def __init__(
        self, *, nr_cblocks: int = 8, nr_oblocks: int = 32, tail: int = 0
    ) -> None:
        self.log: list[tuple[str, str, int, int]] = []
        self.metadata = Spy(MemoryDevice(METADATA_SIZE, name="m"), self.log)
        self.cache = Spy(MemoryDevice(nr_cblocks * BLOCK, name="c"), self.log)
        self.origin = Spy(MemoryDevice(nr_oblocks * BLOCK + tail, name="o"), self.log)
        self.clock = SimClock()
        self.ctx = Context(
            {"m": self.metadata, "c": self.cache, "o": self.origin},
            nr_oblocks * BLOCK + tail,
            self.clock,
        )

    async def table(self, words: str = "0 smq 0", *, nr_oblocks: int = 0) -> "Table":
        """Load a table, without resuming it."""
        ctx = self.ctx
        if nr_oblocks:
            ctx.length = nr_oblocks * BLOCK
        line = ["m", "c", "o", str(SECTORS), *words.split()]
        return Table(self, await construct(ctx, line))

    async def resumed(
        self,
        words: str = "0 smq 0",
        *,
        mapped: Iterable[tuple[int, int]] = (),
        dirty: Iterable[int] = (),
    ) -> "Table":
        """Load and resume a table, then map (cblock, oblock) pairs, and dirty some cblocks."""
        table = await self.table(words)
        await table.resume()
        dirty = set(dirty)
        for cblock, oblock in mapped:
            table.map(cblock, oblock, dirty=cblock in dirty)
        return table

    def cut_power(self) -> None:
        """Forget what is in core."""
        self.ctx.shared(self.metadata).clear()

    def resize_cache(self, nr_cblocks: int) -> None:
        self.cache.size = nr_cblocks * BLOCK


class Table:
    """One table: the parts, and what the target does with them at resume and suspend."""

    def __init__(self, bench: Bench, parts: Parts) -> None:
        self.bench = bench
        self.parts = parts
        self.nr_failures = 0
        self.nr_events = 0
        self.committer = Committer(
            "c",
            parts.metadata,
            parts.metadata_device,
            (parts.cache, parts.origin),
            bench.clock,
            committed=self._committed,
            failed=self._failed,
            metadata_failed=parts.metadata.blame,
        )
        self.discards = parts.discards
        self.activation = Activation(bench.ctx, parts, self.committer)

    @property
    def metadata(self) -> CacheMetadata:
        return self.parts.metadata

    async def resume(self) -> None:
        await self.activation.preresume()

    def map(self, cblock: int, oblock: int, *, dirty: bool = False) -> None:
        self.metadata.insert(cblock, oblock, dirty=dirty)
        self.parts.policy.load_mapping(cblock, oblock, dirty, None)

    async def suspend(self) -> None:
        """Do as postsuspend does: a full sync."""
        metadata, policy = self.metadata, self.parts.policy
        hints = array("I", map(policy.get_hint, range(metadata.nr_cblocks)))
        metadata.prepare_shutdown(
            policy=PolicyIdentity(policy.name, policy.version, policy.hint_size),
            hints=hints,
            discarded=self.discards.as_recorded(),
        )
        assert await self.committer.commit(clean_shutdown=True)
        await self.committer.quiesce()

    def blocks(self) -> Blocks:
        bench = self.bench
        return Blocks(
            bench.ctx,
            self.parts,
            self.committer,
            remap=_parked,
            broken=_broken,
        )

    async def from_disk(self) -> CacheMetadata:
        """Open the metadata that a power cut now would leave."""
        device = self.bench.metadata.device
        opening = CacheMetadata.open(
            device_size=device.size, block_size=self.parts.block_size
        )
        return await metadata_io.run(device, opening)

    def _committed(self) -> None:
        if self.metadata.changed:  # as the target does: more than one commit takes
            self.committer.note_change()

    def _failed(self) -> None:
        self.nr_failures += 1


def _parked(bio: Bio) -> None:
    raise AssertionError(f"no test parks a bio: {bio}")


def _broken(error: BaseException) -> None:
    raise error
