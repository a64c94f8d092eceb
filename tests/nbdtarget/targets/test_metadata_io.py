# SPDX-License-Identifier: Apache-2.0
"""Metadata's operations reach a device or a file, and nothing is left in flight."""

import asyncio
import errno as errnos
import inspect
import os
from pathlib import Path

import pytest

from nbdtarget.bio import FUA, OP_FLUSH, OP_READ, OP_WRITE, Bio
from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.base import Device
from nbdtarget.targets.metadata_io import run, run_file
from nbdtarget_metadata.clone.metadata import CloneMetadata
from nbdtarget_metadata.errors import MetadataError, NotFormatted
from nbdtarget_metadata.operations import Answer, Flush, Operation, Read, Steps, Write
from tests.support.metadata.report import check

SIZE = CloneMetadata.device_size_min(100)
UUID = bytes(range(16))


class RecordingDevice(Device):
    """Memory that logs bios; holds them until `release` if told to; fails `failing` ops."""

    def __init__(self, *, holding: bool = False) -> None:
        super().__init__("recording", SIZE)
        self.content = bytearray(SIZE)
        self.log: list[tuple[int, int, int, int]] = []
        self.holding = holding
        self.held: list[Bio] = []
        self.failing: set[int] = set()

    def submit(self, bio: Bio) -> None:
        self.log.append((bio.op, bio.offset, bio.length, bio.flags))
        if self.holding:
            bio.own()
            self.held.append(bio)
        else:
            self._carry_out(bio)

    def release(self) -> None:
        held, self.held = self.held, []
        for bio in held:
            self._carry_out(bio)

    def _carry_out(self, bio: Bio) -> None:
        if bio.op in self.failing:
            bio.end(errnos.EIO)
            return
        place = slice(bio.offset, bio.offset + bio.length)
        if bio.payload is not None and bio.op == OP_READ:
            bio.payload[:] = self.content[place]
        elif bio.payload is not None:
            self.content[place] = bio.payload
        bio.end(0)

    async def close(self) -> None:
        return


class Script:
    """Steps that yield what they are told, and note the answers and whether they were closed."""

    def __init__(self, *operations: Operation | tuple[Operation, ...]) -> None:
        self.operations = operations
        self.answers: list[Answer | tuple[Answer, ...]] = []
        self.closed = False

    def __call__(self) -> Steps[str]:
        try:
            for operation in self.operations:
                answer = yield operation
                if isinstance(answer, memoryview | bytearray):
                    answer = bytes(answer)
                self.answers.append(answer)
        finally:
            self.closed = True
        return "done"


def format_steps() -> Steps[CloneMetadata]:
    return CloneMetadata.format(
        device_size=SIZE, region_size=4096, target_size=409600, uuid=UUID
    )


async def settle() -> None:
    """Let everything run that can."""
    for _ in range(10):
        await asyncio.sleep(0)


SCRIPT = (Write(0, b"abcd"), Write(512, b"ef", fua=True), Flush(), Read(1, 3))
ANSWERS = [None, None, None, b"bcd"]


async def test_operations_become_bios_in_order() -> None:
    device, script = RecordingDevice(), Script(*SCRIPT)
    assert await run(device, script()) == "done"
    assert script.answers == ANSWERS
    assert device.log == [
        (OP_WRITE, 0, 4, 0),
        (OP_WRITE, 512, 2, FUA),
        (OP_FLUSH, 0, 0, 0),
        (OP_READ, 1, 3, 0),
    ]


async def test_tuple_of_operations_is_carried_out_at_the_same_time() -> None:
    device = RecordingDevice(holding=True)
    script = Script((Write(0, b"ab"), Read(0, 2)))
    task = asyncio.ensure_future(run(device, script()))
    await settle()
    device.release()
    assert await task == "done"
    (answers,) = script.answers
    assert isinstance(answers, tuple)
    assert (answers[0], bytes(answers[1] or b"")) == (None, b"ab")


async def test_pause_lets_others_run() -> None:
    turns: list[str] = []

    async def other() -> None:
        turns.append("other")

    def steps() -> Steps[None]:
        turns.append("before")
        answer = yield ()
        assert answer == ()
        turns.append("after")

    task = asyncio.ensure_future(other())
    await run(RecordingDevice(), steps())
    await task
    assert turns == ["before", "other", "after"]


async def test_metadata_is_formatted_and_opened_over_a_device() -> None:
    device = RecordingDevice()
    metadata = await run(device, format_steps())
    report = await run(device, check(device.size))
    assert report.uuid == metadata.uuid == UUID


async def test_device_error_closes_the_steps() -> None:
    device, script = RecordingDevice(), Script(*SCRIPT)
    device.failing = {OP_FLUSH}
    with pytest.raises(DeviceError) as caught:
        await run(device, script())
    assert (caught.value.errno, caught.value.op) == (errnos.EIO, "flush")
    assert script.closed


async def test_error_of_one_waits_for_the_others() -> None:
    device = RecordingDevice(holding=True)
    device.failing = {OP_READ}
    script = Script((Read(0, 2), Write(0, b"ab")))
    task = asyncio.ensure_future(run(device, script()))
    await settle()
    read, device.held = device.held[0], device.held[1:]
    device._carry_out(read)
    await settle()
    assert not task.done()
    assert not script.closed
    device.release()
    with pytest.raises(DeviceError):
        await task
    assert script.closed


async def test_error_of_the_steps_comes_out() -> None:
    with pytest.raises(NotFormatted):
        await run(RecordingDevice(), check(SIZE))


@pytest.mark.parametrize("cancellations", [1, 2])
async def test_cancelled_run_waits_for_what_is_in_flight(cancellations: int) -> None:
    # A late write would land on what the next owner of its place has written.
    device = RecordingDevice(holding=True)
    script = Script(Write(0, b"ab"), Flush())
    task = asyncio.ensure_future(run(device, script()))
    await settle()
    for _ in range(cancellations):
        task.cancel()
        await settle()
    assert not task.done()
    assert not script.closed
    device.release()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert script.closed
    assert device.log == [(OP_WRITE, 0, 2, 0)]


async def test_cancelled_run_forgets_the_error_of_what_was_in_flight() -> None:
    device = RecordingDevice(holding=True)
    device.failing = {OP_WRITE}
    task = asyncio.ensure_future(run(device, Script(Write(0, b"ab"))()))
    await settle()
    task.cancel()
    await asyncio.sleep(0)
    device.release()
    with pytest.raises(asyncio.CancelledError):
        await task


# Over a file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "metadata"
    path.write_bytes(bytes(SIZE))
    return path


def test_operations_reach_a_file(path: Path) -> None:
    script = Script(*SCRIPT, (Write(4, b"gh"), Read(0, 1)), ())
    assert run_file(path, script()) == "done"
    assert script.answers == [*ANSWERS, (None, b"a"), ()]
    assert path.read_bytes()[:6] == b"abcdgh"
    assert path.read_bytes()[512:514] == b"ef"


def test_fua_and_flush_of_a_file_are_fdatasync(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[bytes] = []
    monkeypatch.setattr(os, "fdatasync", lambda fd: synced.append(os.pread(fd, 2, 0)))
    run_file(path, Script(Write(0, b"ab", fua=True), Write(0, b"cd"), Flush())())
    assert synced == [b"ab", b"cd"]


def test_metadata_is_formatted_and_checked_over_a_file(path: Path) -> None:
    run_file(path, format_steps())
    fd = os.open(path, os.O_RDWR)
    try:
        assert run_file(fd, check(SIZE)).uuid == UUID
    finally:
        os.close(fd)


def test_check_of_a_read_only_file_writes_nothing(path: Path) -> None:
    run_file(path, format_steps())
    before = path.read_bytes()
    assert run_file(path, check(SIZE), read_only=True).generation == 1
    assert path.read_bytes() == before


def test_write_to_a_read_only_file_fails(path: Path) -> None:
    with pytest.raises(DeviceError) as caught:
        run_file(path, Script(Write(8, b"ab"))(), read_only=True)
    assert (caught.value.op, caught.value.offset, caught.value.length) == (
        "write",
        8,
        2,
    )


def test_missing_file_closes_the_steps(tmp_path: Path) -> None:
    steps = Script(*SCRIPT)()
    with pytest.raises(FileNotFoundError):
        run_file(tmp_path / "missing", steps)
    assert inspect.getgeneratorstate(steps) == inspect.GEN_CLOSED


def test_read_past_the_end_of_a_file_is_an_error(path: Path) -> None:
    script = Script(Read(SIZE - 1, 2))
    with pytest.raises(DeviceError, match="read of 2 bytes"):
        run_file(path, script())
    assert script.closed


def test_error_of_the_steps_comes_out_of_a_file(path: Path) -> None:
    with pytest.raises(MetadataError):
        run_file(path, check(SIZE))


async def test_flush_fails_if_the_device_has_lost_what_the_run_has_written() -> None:
    device = RecordingDevice()
    device.health.note_loss()  # before the run: nothing of it

    def steps(loses: bool) -> Steps[None]:
        yield Write(0, bytes(4096))
        if loses:
            device.health.note_loss()
        yield Flush()

    await run(device, steps(loses=False))
    with pytest.raises(DeviceError, match="flush"):
        await run(device, steps(loses=True))
    await run(device, steps(loses=False))
