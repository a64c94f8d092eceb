# SPDX-License-Identifier: Apache-2.0
"""The memory of a device that is removed is given back at once, without the garbage collector."""

import contextlib
import gc
import os
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest

# A target type is imported with its first table. What its modules hold stays, so they are imported now.
import nbdtarget.targets.cache.constructor
import nbdtarget.targets.clone.constructor  # noqa: F401
from nbdtarget.devices import resolve
from nbdtarget.devices.file.ring import find_out, maybe_reader
from nbdtarget.devices.file.windows import windows_of_loop
from nbdtarget.dm.registry import Registry
from nbdtarget.fast.compiled import IS_COMPILED
from tests.support.patience import until

SIZE = 8 << 20
SECTORS = SIZE // 512
TABLES = {
    "zero": "zero",
    "error": "error",
    "memory": f"linear memory:{SIZE} 0",
    "linear": "linear {a} 0",
    "striped": "striped 2 128 {a} 0 {b} 0",
    "delay": "delay {a} 0 1",
    "flakey": "flakey {a} 0 60 0",
    "dust": "dust {a} 0 512",
    "log-writes": "log-writes {a} {b}",
    "powercut": "powercut {a} 0",
    "clone": "clone {m} {b} {a} 128",
    "cache": "cache {m} {b} {a} 128 1 writeback smq 0",
}

# Modules whose objects may be large or hold descriptors. A clone and a cache leave a few small objects to the collector.
LARGE = ("nbdtarget.devices.", "nbdtarget.dm.", "nbdtarget.policies.")
METADATA = ("CloneMetadata", "CacheMetadata", "CloneTarget", "CacheTarget", "Committer")


@pytest.fixture(autouse=True)
def no_collector() -> Iterator[None]:
    gc.collect()
    gc.freeze()  # `get_objects` shows only what a test has made
    gc.disable()
    yield
    gc.enable()  # what is frozen stays so: else each collection from here on looks at all modules and tests


def _left_over() -> list[str]:
    """The large objects that still exist, but for those of the registry itself."""
    return [
        f"{type(each).__module__}.{type(each).__name__}"
        for each in gc.get_objects()
        if type(each).__name__ in METADATA
        or (type(each).__module__ or "").startswith(LARGE)
    ]


def _make_what_stays() -> None:
    """All files of the loop share these."""
    find_out()
    maybe_reader()
    if IS_COMPILED:
        windows_of_loop()


@pytest.fixture
def names(tmp_path: Path) -> dict[str, str]:
    names = {name: str(tmp_path / name) for name in "abm"}
    for name in "ab":
        with open(names[name], "wb") as file:
            file.write(os.urandom(1 << 20) if name == "a" else b"")
            file.truncate(SIZE)
    return names


async def _use(registry: Registry, name: str) -> None:
    device = registry.get(name)
    await device.write(4096, b"x" * 4096)
    await device.read(0, 1 << 20)
    await device.flush()
    await device.extents(0, SIZE)
    await device.status()


async def _left_in_the_end(existing: list[str]) -> list[str]:
    """Return the objects that are left after some turns of the loop, which threads need to end."""
    with contextlib.suppress(TimeoutError):
        await until(lambda: _left_over() == existing)
    return _left_over()


@pytest.mark.parametrize("kind", TABLES)
async def test_nothing_of_a_removed_device_is_left(
    kind: str, names: dict[str, str]
) -> None:
    _make_what_stays()
    registry = Registry(resolve)
    existing = _left_over()
    line = TABLES[kind].format_map(names)
    await registry.create("disk", f"0 {SECTORS} {line}")
    if kind != "error":
        await _use(registry, "disk")
    device = weakref.ref(registry.get("disk"))
    assert len(_left_over()) > len(existing)
    await registry.remove("disk")
    assert await _left_in_the_end(existing) == existing
    assert device() is None
    await registry.close()


async def test_nothing_of_a_stack_is_left(names: dict[str, str]) -> None:
    _make_what_stays()
    registry = Registry(resolve)
    existing = _left_over()
    await registry.create("lower", f"0 {SECTORS} linear {names['a']} 0")
    await registry.create("upper", f"0 {SECTORS} linear /dev/mapper/lower 0")
    await _use(registry, "upper")
    await registry.load("upper", f"0 {SECTORS} zero")
    await registry.resume("upper")
    await registry.remove("lower")
    await registry.remove("upper")
    assert await _left_in_the_end(existing) == existing
    await registry.close()
