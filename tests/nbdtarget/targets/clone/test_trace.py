# SPDX-License-Identifier: Apache-2.0
"""The first reads of clients are recorded, and these regions are hydrated first the next time."""

import random
from pathlib import Path

import pytest

from nbdtarget.devices import resolve
from nbdtarget.dm.registry import Registry
from nbdtarget.porcelain.clone import CloneJob, CloneOptions
from nbdtarget.porcelain.trace_file import read_trace
from nbdtarget.targets.clone import trace as module
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget.targets.clone.trace import Trace, grouped
from tests.support.image_server import ImageServer, image_of
from tests.support.patience import until
from tests.support.porcelain_clone import Recorder

KIB = 1 << 10
MIB = 1 << 20
SHIFT = 16
IMAGE = image_of(MIB) * 16


def test_each_region_is_recorded_once_in_order() -> None:
    trace = Trace(1 << 20, SHIFT)
    trace.note(5 << SHIFT, 4096)
    trace.note((5 << SHIFT) + 8192, 4096)
    trace.note(4096, 4096)
    trace.note(1 << SHIFT, 2 << SHIFT)  # follows the one before
    trace.note(4 << SHIFT, 3 << SHIFT)  # the middle is known
    assert trace.ranges == [
        (5 << SHIFT, 6 << SHIFT), (0, 3 << SHIFT), (4 << SHIFT, 5 << SHIFT), (6 << SHIFT, 7 << SHIFT),
    ]  # fmt: skip


def test_last_region_may_be_short() -> None:
    trace = Trace((3 << SHIFT) + 512, SHIFT)
    trace.note(3 << SHIFT, 512)
    assert trace.ranges == [(3 << SHIFT, (3 << SHIFT) + 512)]


def test_trace_is_a_set_with_an_order() -> None:
    source = random.Random(3)
    trace = Trace(64 << SHIFT, SHIFT)
    wanted: dict[int, None] = {}
    for _ in range(200):
        offset = source.randrange(64 << SHIFT)
        length = source.randrange(1, min((64 << SHIFT) - offset, 5 << SHIFT) + 1)
        trace.note(offset, length)
        for nr in range(offset >> SHIFT, ((offset + length - 1) >> SHIFT) + 1):
            wanted.setdefault(nr)
    found = [nr for b, e in trace.ranges for nr in range(b >> SHIFT, e >> SHIFT)]
    assert found == list(wanted)


def test_trace_has_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RANGES_MAX", 3)
    trace = Trace(1 << 20, SHIFT)
    for nr in range(0, 16, 2):
        trace.note(nr << SHIFT, 1)
    assert len(trace.ranges) == 3


def test_neighbours_of_one_time_are_joined() -> None:
    ranges = [(MIB, MIB + 64 * KIB), (0, 64 * KIB), (MIB + 128 * KIB, MIB + 192 * KIB)]
    assert grouped(ranges) == [(0, 64 * KIB), (MIB, MIB + 192 * KIB)]
    # The reads are far apart in time, so the order stays.
    ranges = [(9 * MIB, 18 * MIB), (0, 64 * KIB)]
    assert grouped(ranges) == ranges


WANTED = [(9 * MIB, 4096), (2 * MIB, 512 * KIB), (15 * MIB, 65536)]


async def clone_of(registry: Registry, path: Path, url: str) -> CloneTarget:
    (path / "dest").write_bytes(bytes(len(IMAGE)))
    device = await registry.create(
        "c",
        f"0 {len(IMAGE) // 512} clone {path}/meta {path}/dest {url} 128 1 no_hydration"
        " 4 hydration_threshold 16 hydration_batch_size 16",
    )
    assert device.active is not None
    target = device.active.targets[0]
    assert isinstance(target, CloneTarget)
    return target


async def test_reads_are_recorded_and_nothing_else(tmp_path: Path) -> None:
    async with ImageServer(IMAGE) as server:
        registry = Registry(resolve)
        target = await clone_of(registry, tmp_path, server.url())
        device = registry.get("c")
        trace = target.record_reads()
        for offset, length in WANTED:
            assert bytes(await device.read(offset, length)) == IMAGE[offset:][:length]
        await device.read(9 * MIB, 512)  # a second look
        await device.write(0, b"x" * 65536)
        await device.prefetch(5 * MIB, 65536)
        await device.read(5 * MIB, 512)  # it is hydrated, and counts all the same
        assert [begin for begin, _ in trace.ranges] == [
            9 * MIB,
            2 * MIB,
            15 * MIB,
            5 * MIB,
        ]
        await registry.close()


async def test_what_was_recorded_is_hydrated_first(tmp_path: Path) -> None:
    async with ImageServer(IMAGE) as server:
        registry = Registry(resolve)
        target = await clone_of(registry, tmp_path, server.url())
        device = registry.get("c")
        # One after the other: then the order of the requests is that of the copies.
        await device.message(0, ["hydration_threshold", "8"])
        await device.message(0, ["hydration_batch_size", "8"])
        nr_asked = len(server.noted)
        target.hydrate_first((offset, offset + length) for offset, length in WANTED)
        await device.message(0, ["enable_hydration"])
        await until(lambda: len(server.noted) > nr_asked + 3)
        asked = [request.begin for request in server.noted[nr_asked : nr_asked + 3]]
        assert asked == [9 * MIB, 2 * MIB, 15 * MIB]
        await until(lambda: target.status_fields()["hydrated_durably"] is True)
        await registry.close()
    assert (tmp_path / "dest").read_bytes() == IMAGE


async def test_command_records_and_uses_a_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    async with ImageServer(IMAGE) as server:
        for record, order in (("t", None), (None, "t")):
            options = CloneOptions(
                source=server.url(),
                dest=f"{record}.img",
                exit_when_hydrated=True,
                record_trace=record,
                hydrate_order=order,
            )
            assert await CloneJob(options, Recorder()).run() == 0
            assert read_trace("t") == []  # no client has read anything
