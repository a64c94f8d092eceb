# SPDX-License-Identifier: Apache-2.0
"""A cache in a real registry, over disks in memory that can fail, wait, and lose power."""

import errno as errnos
from collections.abc import Iterable

from nbdtarget.bio import OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import ConstructorError, ResolveError, TableError
from nbdtarget.common.permissions import OVERWRITE
from nbdtarget.devices.base import Device
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.targets import metadata_io
from nbdtarget.targets.cache.target import CacheTarget
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.errors import CorruptMetadata, NotFormatted
from nbdtarget_metadata.mode import Mode
from nbdtarget_metadata.tools.cache_check import CACHE_CHECKS
from nbdtarget_metadata.tools.check import mend
from tests.support.clock import SimClock, settle
from tests.support.devices import CrashDevice
from tests.support.spy import Spy

__all__ = ["BLOCK", "DIRTY_BUSY", "SECTORS", "CacheLab"]

BLOCK = 32 << 10
SECTORS = BLOCK // 512
METADATA_SIZE = 4 << 20  # with room for more cache blocks

# A writeback cache that never cleans by itself.
DIRTY_BUSY = "0 smq 2 migration_threshold 0"

FIELDS = (
    "metadata_block_size",
    "metadata_blocks",
    "block_size",
    "cache_blocks",
    "read_hits",
    "read_misses",
    "write_hits",
    "write_misses",
    "demotions",
    "promotions",
    "dirty",
)


class LabSpy(Spy):
    """A spy that holds back bios of some operations only, if `holds` says which."""

    holds: frozenset[int] = frozenset()

    def submit(self, bio: Bio) -> None:
        if self.hold and self.holds and bio.op not in self.holds:
            self.hold = False
            try:
                super().submit(bio)
            finally:
                self.hold = True
        else:
            super().submit(bio)

    def let_go(self) -> None:
        self.holds = frozenset()
        super().let_go()


class CacheLab:
    """Disks called /m, /c and /o, and a mapped device `c` on them. Also the registry's opener.

    Attributes:
        log: (disk, operation, offset, length) of all I/O, in order.
        length: of the next table, bytes.
        block_size: of the next table, bytes.
    """

    def __init__(
        self, *, nr_cblocks: int = 8, nr_oblocks: int = 32, tail: int = 0
    ) -> None:
        self.log: list[tuple[str, str, int, int]] = []
        self.length = nr_oblocks * BLOCK + tail
        self.block_size = BLOCK
        self._plug_in(
            CrashDevice(METADATA_SIZE, name="m"),
            CrashDevice(nr_cblocks * BLOCK, name="c"),
            CrashDevice(self.length, name="o"),
        )

    def _plug_in(self, *disks: CrashDevice) -> None:
        self.disks = {disk.name: disk for disk in disks}
        self.spies = {disk.name: LabSpy(disk, self.log) for disk in disks}
        self.metadata, self.cache, self.origin = self.spies.values()
        self.clock = SimClock()
        self.registry = Registry(self, clock=self.clock)

    # The methods of an opener, for the registry

    def identity(self, name: str) -> str:
        return name

    def may_create(self, name: str) -> bool:
        return False

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        spy = self.spies.get(name.removeprefix("/"))
        if spy is None:
            raise ResolveError(name, "No such file or directory", errnos.ENOENT)
        return spy

    async def create_device(self, name: str, size: int) -> Device:
        raise AssertionError("nothing may be created")

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing was created")

    # The mapped device

    def line(self, words: str = "0 smq 0") -> str:
        sectors = self.block_size // 512
        return f"0 {self.length // 512} cache /m /c /o {sectors} {words}"

    async def create(self, words: str = "0 smq 0") -> MappedDevice:
        device = await self.registry.create(
            "c", self.line(words), permissions=frozenset((OVERWRITE,))
        )
        await settle()
        self.log.clear()
        return device

    async def load(self, words: str = "0 smq 0") -> None:
        await self.registry.load(
            "c", self.line(words), permissions=frozenset((OVERWRITE,))
        )

    async def reload(self, words: str = "0 smq 0") -> None:
        await self.load(words)
        await self.registry.resume("c")

    async def suspend(self) -> None:
        await self.registry.suspend("c")

    async def resume(self) -> None:
        await self.registry.resume("c")

    async def remove(self) -> None:
        await self.registry.remove("c")

    async def recreate(self, words: str = "0 smq 0") -> None:
        await self.remove()
        await self.create(words)

    async def refused(self, words: str, *, loading: bool = False) -> ConstructorError:
        """Create or load a table, which must fail."""
        try:
            await (self.load(words) if loading else self.create(words))
        except ConstructorError as error:
            return error
        raise AssertionError(f"{words} was accepted")

    async def resume_refused(self) -> TableError:
        try:
            await self.resume()
        except TableError as error:
            return error
        raise AssertionError("resumed")

    async def message(self, words: str) -> str | None:
        return await self.device.message(0, words.split())

    @property
    def device(self) -> MappedDevice:
        return self.registry.get("c")

    @property
    def target(self) -> CacheTarget:
        table = self.device.active
        assert table is not None
        (target,) = table.targets
        assert isinstance(target, CacheTarget)
        return target

    @property
    def core(self) -> CacheMetadata:
        """The metadata of the live table."""
        return self.target._metadata

    def cblock(self, oblock: int) -> int | None:
        return self.core.maybe_cblock(oblock)

    # I/O

    def submit(
        self, op: int, offset: int = 0, length: int = 0, flags: int = 0, fill: str = "w"
    ) -> Bio:
        """Submit one bio; it may or may not have ended when this returns."""
        payload: memoryview | None = None
        if op in (OP_READ, OP_WRITE):
            payload = memoryview(bytearray(fill.encode() * length))
        bio = Bio(op, offset, length, payload, flags, lambda _: None)
        self.device.submit(bio)
        return bio

    def flush(self) -> Bio:
        return self.submit(OP_FLUSH)

    async def write(self, oblock: int, fill: str = "w", *, fua: bool = False) -> None:
        """Write a whole block, which caches it in writeback while there is room."""
        data = fill.encode() * self.block_size
        await self.device.write(oblock * self.block_size, data, fua=fua)

    async def write_part(self, oblock: int, fill: str = "p", at: int = 512) -> None:
        """Write one sector of a block."""
        await self.device.write(oblock * self.block_size + at, fill.encode() * 512)

    async def read(self, oblock: int) -> bytes:
        return bytes(await self.device.read(oblock * self.block_size, self.block_size))

    async def fill(self, oblocks: Iterable[int], fill: str = "w") -> None:
        """Have these blocks cached and dirty."""
        for oblock in oblocks:
            await self.write(oblock, fill)
            assert self.cblock(oblock) is not None

    async def clean(self) -> None:
        """Have all that is dirty written back."""
        await self.message("clean_now")
        for _ in range(200):
            if not self.core.nr_dirty:
                return
            await self.pass_time(0.1)
        raise AssertionError("still dirty")

    async def fill_clean(self, oblocks: Iterable[int], fill: str = "w") -> None:
        """Have these blocks cached and clean, and the log forgotten."""
        await self.fill(oblocks, fill)
        await self.clean()
        await self.device.flush()
        await settle()
        self.log.clear()

    def put(self, disk: str, content: bytes) -> None:
        """Have a disk hold this from its beginning, again and again."""
        size = self.disks[disk].size
        self.disks[disk]._stable[:] = (content * -(-size // len(content)))[:size]

    async def warm(self, oblock: int) -> None:
        """Read a block until it is cached."""
        for _ in range(8):
            await self.read(oblock)
            await self.pass_time(0.75)
            if self.cblock(oblock) is not None:
                return
        raise AssertionError("never promoted")

    # Looking

    async def status(self, *, noflush: bool = True) -> list[str]:
        (line,) = await self.device.status(noflush=noflush)
        return line[3].split(" ")

    async def fields(self) -> dict[str, str]:
        return dict(zip(FIELDS, await self.status(), strict=False))

    async def field(self, name: str) -> str:
        return (await self.fields())[name]

    async def used(self) -> int:
        return int((await self.field("cache_blocks")).partition("/")[0])

    def asked(self, disk: str, *ops: str) -> list[tuple[str, int, int]]:
        """(operation, offset, length) that a disk was asked for."""
        return [
            (op, at, length)
            for name, op, at, length in self.log
            if name == disk and (not ops or op in ops)
        ]

    def ops(self) -> list[str]:
        """The log as "disk operation", and forget it."""
        ops = [f"{disk} {op}" for disk, op, _, _ in self.log]
        self.log.clear()
        return ops

    def on_disk(self, disk: str, oblock: int) -> bytes:
        image = self.disks[disk].image()
        return image[oblock * self.block_size : (oblock + 1) * self.block_size]

    async def recorded(self) -> CacheMetadata:
        """The metadata that a power cut now would leave."""
        disk = CrashDevice(METADATA_SIZE, content=self.disks["m"].stable_image())
        opening = CacheMetadata.open(device_size=disk.size, block_size=self.block_size)
        return await metadata_io.run(disk, opening)

    async def unchecked(self) -> CacheMetadata:
        """As `recorded`, once somebody has checked it and taken back `needs_check`."""
        disk = CrashDevice(METADATA_SIZE, content=self.disks["m"].image())
        mending = mend(CACHE_CHECKS, disk.size, heal=False, clear_needs_check=True)
        await metadata_io.run(disk, mending)
        opening = CacheMetadata.open(device_size=disk.size, block_size=self.block_size)
        return await metadata_io.run(disk, opening)

    # Failing

    def hold(self, disk: str, *ops: int) -> None:
        """Hold these operations back, or all, until the spy lets go."""
        self.spies[disk].holds = frozenset(ops)
        self.spies[disk].hold = True

    def fail(self, disk: str, *ops: int, errno: int = errnos.EIO) -> None:
        """Let these operations fail; none: let all work again."""
        self.spies[disk].fails = lambda bio: errno if bio.op in ops else 0

    def fail_once(self, disk: str, op: int) -> None:
        """Let the next of these operations fail."""
        left = [errnos.EIO]

        def fails(bio: Bio) -> int:
            return left.pop() if left and bio.op == op else 0

        self.spies[disk].fails = fails

    async def make_read_only(self, oblock: int = 31) -> None:
        """Let the commit of a promotion fail, though the disk can still be told of that."""
        await self.write(oblock)
        self.fail_once("m", OP_WRITE)
        assert self.flush().status < 0
        await settle()
        self.fail("m")
        assert self.core.mode is Mode.RO

    async def cut_power(self, *, kills_only: bool = False) -> None:
        """Lose what is in core, and what the disks had in theirs; then have power again.

        `kills_only`: as SIGKILL: the disks lose nothing.
        """
        old = self.disks
        images = {
            name: disk.image() if kills_only else disk.stable_image()
            for name, disk in old.items()
        }
        registry = self.registry
        for name, disk in old.items():
            disk.cut_power()
            self.spies[name].let_go()
        await registry.close()
        self._plug_in(*(disk.reopen(images[name]) for name, disk in old.items()))
        self.log.clear()

    async def mark_needs_check(self) -> None:
        """Have the metadata on the disk say that they need a check."""
        disk = self.disks["m"]
        opening = CacheMetadata.open(device_size=disk.size, block_size=self.block_size)
        metadata = await metadata_io.run(disk, opening)
        metadata.abort()
        await metadata_io.run(disk, metadata.record_needs_check())

    def resize(self, disk: str, size: int) -> None:
        """Give a disk another size; what it loses is gone."""
        image = self.disks[disk].image()[:size].ljust(size, b"\0")
        self.disks[disk]._stable[:] = image
        self.disks[disk].size = self.spies[disk].size = size

    async def pass_time(self, seconds: float, step: float = 0.25) -> None:
        for _ in range(max(1, round(seconds / step))):
            await settle(20)
            self.clock.advance(step)
        await settle(20)

    async def close(self) -> None:
        """Let everything go, whatever a test has done, and come to rest."""
        for spy in self.spies.values():
            spy.fails = lambda _: 0
            spy.let_go()
        await settle()
        await self.registry.close()

    async def check(self) -> None:
        """Check that the metadata on disk can be opened, unless they say that they need a check."""
        try:
            await self.recorded()
        except NotFormatted:
            pass
        except CorruptMetadata as error:
            if error.found != "needs_check":
                raise
