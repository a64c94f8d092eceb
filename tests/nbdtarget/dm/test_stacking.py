# SPDX-License-Identifier: Apache-2.0
"""Stacks: FLUSH reaches every leaf, sizes change under those who stand on them, names too."""

import asyncio
import errno as errnos
import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nbdtarget.bio import (
    FUA,
    OP_DISCARD,
    OP_FLUSH,
    OP_READ,
    OP_WRITE,
    OP_WRITE_ZEROES,
    PENDING,
)
from nbdtarget.common.errors import ConstructorError
from nbdtarget.devices.base import Device
from nbdtarget.dm.registry import Registry
from nbdtarget.server.export import DirectoryExports
from nbdtarget.targets.powercut.volatile_cache import Fate
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.clock import SimClock, settle
from tests.support.devices import CrashDevice
from tests.support.tables import Disks, content, submit

LEAVES, SECTORS = 4, 128
BYTES = SECTORS * 512


class Leaves:
    """A `DeviceOpener` of disks that lose what was not flushed."""

    def __init__(self) -> None:
        self.disks = {
            f"/{nr}": CrashDevice(BYTES, name=f"/{nr}") for nr in range(LEAVES)
        }

    async def open_device(self, name: str, *, read_only: bool) -> Device:
        return self.disks[name]

    async def create_device(self, name: str, size: int) -> Device:
        raise AssertionError("nothing is created here")

    async def remove_created(self, name: str) -> None:
        raise AssertionError("nothing is created here")

    def may_create(self, name: str) -> bool:
        return False

    def identity(self, name: str) -> str:
        return name


def line(rng: random.Random, at: int, length: int, names: list[str]) -> str:
    """One table line over parts of devices that all have SECTORS."""
    name = rng.choice(names)
    match rng.randrange(4):
        case 0:
            return f"{at} {length} zero"
        case 1 if length % 16 == 0:
            runs = " ".join(
                f"{rng.choice(names)} {rng.randrange(SECTORS - length // 2 + 1)}"
                for _ in range(2)
            )
            return f"{at} {length} striped 2 8 {runs}"
        case _:
            return f"{at} {length} linear {name} {rng.randrange(SECTORS - length + 1)}"


def table(rng: random.Random, names: list[str]) -> str:
    """SECTORS of table in one to four lines."""
    cuts = sorted(rng.sample(range(16, SECTORS, 16), rng.randrange(4)))
    borders = [0, *cuts, SECTORS]
    return "\n".join(
        line(rng, begin, end - begin, names)
        for begin, end in itertools.pairwise(borders)
    )


async def power_cut_after_flush(seed: int) -> None:
    rng = random.Random(seed)
    leaves = Leaves()
    registry = Registry(leaves, clock=SimClock())
    names = list(leaves.disks)
    for nr in range(rng.randint(1, 6)):
        await registry.create(f"d{nr}", table(rng, names))
        names.append(f"/dev/mapper/d{nr}")
    top = registry.get(f"d{nr}")
    for _ in range(rng.randint(1, 12)):
        at = rng.randrange(BYTES - 1)
        data = rng.randbytes(rng.randint(1, min(8192, BYTES - at)))
        assert submit(top, OP_WRITE, at, data).status == 0
    assert submit(top, OP_FLUSH).status == 0
    for name, disk in leaves.disks.items():
        assert disk.crash(seed, Fate.DROP) == disk.image(), f"no FLUSH reached {name}"


@given(st.integers(min_value=0, max_value=1 << 32))
def test_flush_at_the_top_makes_durable_what_lies_on_every_leaf(seed: int) -> None:
    asyncio.run(power_cut_after_flush(seed))


# A size that changes


async def test_shrunk_table_refuses_old_connections_as_nbd_wants() -> None:
    disks = Disks(a=65536)
    device = await disks.create("0 32 linear /a 0")
    exports = DirectoryExports(disks.registry)
    await disks.registry.load("d", "0 16 linear /a 0")
    before = exports.lookup("d")
    await device.resume()
    after = exports.lookup("d")
    assert before is not None
    assert after is not None
    assert (before.size, after.size) == (16384, 8192)
    for op, errno in (
        (OP_WRITE, errnos.ENOSPC),
        (OP_WRITE_ZEROES, errnos.ENOSPC),
        (OP_READ, errnos.EINVAL),
        (OP_DISCARD, errnos.EINVAL),
    ):
        payload: bytes | int = b"data" if op == OP_WRITE else 4
        assert submit(device, op, 8190, payload).status == errno
        assert submit(device, op, 8188, payload).status == 0
    await disks.registry.close()


async def test_grown_table_is_there_at_once() -> None:
    disks = Disks(a=65536, b=65536)
    device = await disks.create("0 8 linear /a 0")
    await disks.registry.load("d", "0 8 linear /a 0\n8 8 linear /b 0")
    assert submit(device, OP_WRITE, 4094, b"over").status == errnos.ENOSPC
    await device.resume()
    export = DirectoryExports(disks.registry).lookup("d")
    assert export is not None
    assert export.size == device.size == 8192
    assert submit(device, OP_WRITE, 4094, b"over").status == 0
    assert (await disks.image("/a"))[4094:4097] == b"ov\0"
    assert (await disks.image("/b"))[:2] == b"er"
    await disks.registry.close()


@pytest.mark.parametrize(
    "upper", ["linear /dev/mapper/low 0", "striped 1 8 /dev/mapper/low 0"]
)
async def test_table_above_a_device_that_has_shrunk_gets_eio_there(upper: str) -> None:
    disks = Disks(a=65536)
    low = await disks.create("0 32 linear /a 0", "low")
    top = await disks.create(f"0 32 {upper}", "top")
    await disks.registry.load("low", "0 16 linear /a 0")
    await low.resume()
    assert top.size == 16384
    assert submit(top, OP_WRITE, 8192, b"data").status == errnos.EIO
    assert submit(top, OP_READ, 8192, 4).status == errnos.EIO
    assert submit(top, OP_WRITE, 4096, b"data").status == 0
    with pytest.raises(ConstructorError, match="low too small for target"):
        await disks.registry.load("top", f"0 32 {upper}")
    # It grows again: what stands on it needs no new table.
    await disks.registry.load("low", "0 48 linear /a 0")
    await low.resume()
    assert submit(top, OP_WRITE, 8192, b"data").status == 0
    await disks.registry.close()


# A name that changes


@pytest.mark.parametrize(
    "words",
    [
        "linear /dev/mapper/low 0",
        "striped 1 8 /dev/mapper/low 0",
        "delay /dev/mapper/low 0 0",
        "flakey /dev/mapper/low 0 1 0",
        "dust /dev/mapper/low 0 512",
        "log-writes /dev/mapper/low /a",
        "powercut /dev/mapper/low 0 0",
        "clone /m /dev/mapper/low /s 8 1 no_hydration",
    ],
)
async def test_table_can_be_loaded_again_after_what_is_below_was_renamed(
    words: str,
) -> None:
    size = 1 << 20
    disks = Disks(m=CloneMetadata.device_size_for(256), a=size, b=size, s=size)
    await disks.create("0 2048 linear /b 0", "low")
    top = await disks.create(f"0 2048 {words}", "top")
    disks.registry.rename("low", "new")
    (line,) = top.table()
    assert line[3].startswith(words.partition(" ")[2].replace("/low", "/new"))
    assert disks.registry.deps(top)[0] in ("/m", "/dev/mapper/new")
    await disks.registry.load("top", " ".join(map(str, line)))
    await top.resume()
    assert top.table() == [line]
    assert submit(top, OP_WRITE, 0, b"data", flags=FUA).status in (0, PENDING)
    await settle()
    assert content(submit(top, OP_READ, 0, 4)) == b"data"
    await disks.registry.close()
