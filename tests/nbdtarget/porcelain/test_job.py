# SPDX-License-Identifier: Apache-2.0
"""The jobs of clone and cache, in this process; test_changed_by_commands.py has a job whose device is removed as a process."""

import asyncio
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nbdtarget.common.heap import HEAP
from nbdtarget.dm.mapped_device import MappedDevice, State
from nbdtarget.porcelain.cache import CacheJob, CacheOptions
from nbdtarget.porcelain.clone import CloneJob, CloneOptions
from nbdtarget.porcelain.export import ExportJob, ExportOptions
from nbdtarget.porcelain.job import Job
from tests.support.patience import PATIENCE_S, until

MIB = 1 << 20
CONTENT = os.urandom(MIB)


class Recorder:
    """A reporter for every kind of job, which remembers the names of what it is told."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.is_serving = asyncio.Event()

    def __getattr__(self, name: str) -> Callable[..., None]:
        def told(*_: object) -> None:
            self.calls.append(name)
            if name == "serving":
                self.is_serving.set()

        return told


@pytest.fixture
def recorder(
    tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch
) -> Recorder:
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("disk").write_bytes(CONTENT)
    return Recorder()


def clone_job(recorder: Any, *, exit_when_hydrated: bool = False) -> Job[Any]:
    options = CloneOptions(
        source="disk", dest="served", exit_when_hydrated=exit_when_hydrated
    )
    return CloneJob(options, recorder)


def export_job(recorder: Any) -> Job[Any]:
    return ExportJob(ExportOptions(disk="disk", name="served"), recorder)


def cache_job(recorder: Any) -> Job[Any]:
    options = CacheOptions(
        origin="disk",
        cache="fast",
        name="served",
        block_size=64 << 10,
        cache_size=MIB,
        mode="writeback",
    )
    return CacheJob(options, recorder)


@pytest.mark.parametrize("make", [clone_job, cache_job])
async def test_heap_of_a_job_s_process_is_trimmed(
    recorder: Recorder, make: Callable[[Recorder], Job[Any]]
) -> None:
    assert make(recorder)._daemon._listener._spare_memory._heap is HEAP


@pytest.mark.parametrize("make", [clone_job, cache_job])
async def test_commit_that_failed_at_the_removal_is_in_the_exit_status(
    recorder: Recorder,
    make: Callable[[Recorder], Job[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make(recorder)
    running = asyncio.create_task(job.run())
    async with asyncio.timeout(PATIENCE_S):
        await recorder.is_serving.wait()
        device = job._daemon.registry.get("served")
        await job._daemon.registry.remove("served")
        monkeypatch.setattr(device, "is_uncommitted", True)
        assert await running == 1


@pytest.mark.parametrize("make", [clone_job, cache_job, export_job])
async def test_start_that_fails_late_ends_in_order(
    recorder: Recorder,
    make: Callable[[Recorder], Job[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    job = make(recorder)
    devices: list[MappedDevice] = []

    def fail_to_tell(*_: object) -> None:
        devices.extend(job._daemon.registry.devices())
        raise RuntimeError("a bug")

    monkeypatch.setattr(recorder, "serving", fail_to_tell, raising=False)
    with pytest.raises(RuntimeError, match="a bug"):
        await job.run()
    assert [device.state for device in devices] == [State.REMOVED]
    # The same disks can be served again, and nothing is in doubt.
    again = make(Recorder())
    running = asyncio.create_task(again.run())
    async with asyncio.timeout(PATIENCE_S):
        await again._served.is_serving.wait()  # type: ignore[attr-defined]
        again._daemon.stop.set()
        assert await running == 0


async def fail(*_: object) -> None:
    raise RuntimeError("a bug")


@pytest.mark.parametrize("make", [clone_job, cache_job, export_job])
async def test_watching_that_fails_is_logged_at_once_and_is_in_the_exit_status(
    recorder: Recorder,
    make: Callable[[Recorder], Job[Any]],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = make(recorder)
    monkeypatch.setattr(job, "_watch", fail)
    running = asyncio.create_task(job.run())
    async with asyncio.timeout(PATIENCE_S):
        await recorder.is_serving.wait()
        await until(lambda: "a bug" in caplog.text)
    assert "served: the command cannot watch its disk any more" in caplog.text
    assert "Traceback" in caplog.text
    assert await job._daemon.registry.get("served").read(0, 512) == CONTENT[:512]
    job._daemon.stop.set()
    async with asyncio.timeout(PATIENCE_S):
        assert await running == 1
    # The end is the usual one: a cache tells what is dirty.
    assert ("stopped" in recorder.calls) == (make is cache_job)


async def test_clone_that_cannot_see_its_end_any_more_does_not_wait_for_it(
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    job = clone_job(recorder, exit_when_hydrated=True)
    monkeypatch.setattr(job, "_watch", fail)
    async with asyncio.timeout(PATIENCE_S):
        assert await job.run() == 1
    assert "a bug" in caplog.text


async def test_job_whose_watching_has_failed_ends_with_its_disk(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = cache_job(recorder)
    monkeypatch.setattr(job, "_watch", fail)
    running = asyncio.create_task(job.run())
    async with asyncio.timeout(PATIENCE_S):
        await recorder.is_serving.wait()
        await job._daemon.registry.remove("served")
        assert await running == 1
