# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget export`: one disk is served as it is. And what each job says about disks, names and addresses."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.porcelain.export import ExportJob, ExportOptions, ExportPlan, plan_export
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import PlainClient, PlainClientError

MIB = 1 << 20
READ_ONLY_FLAG = 2


class Recorder:
    """A reporter that tells when the disk is served, and where."""

    def __init__(self) -> None:
        self.is_serving = asyncio.Event()
        self.uris: list[str] = []

    def serving(self, plan: ExportPlan, uris: list[str]) -> None:
        self.uris = uris
        self.is_serving.set()

    def stopping(self) -> None:
        self.is_serving.clear()


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    monkeypatch.chdir(tmp_path)
    Path("disk.img").write_bytes(bytes(range(256)) * (MIB // 256))
    return tmp_path


@asynccontextmanager
async def served(**options: object) -> AsyncIterator[Recorder]:
    """A job that serves; at the end it is stopped, and has ended well."""
    recorder = Recorder()
    job = ExportJob(ExportOptions(**options), recorder)  # type: ignore[arg-type]
    running = asyncio.create_task(job.run())
    async with asyncio.timeout(PATIENCE_S):
        await recorder.is_serving.wait()
        yield recorder
        os.kill(os.getpid(), signal.SIGINT)
        assert await running == 0


async def in_thread(work: Path, ask: Callable[[PlainClient], None]) -> None:
    def talk() -> None:
        with PlainClient(work / "run/nbdtarget/disk.sock", "disk") as client:
            ask(client)

    await asyncio.to_thread(talk)


async def test_plan_is_a_linear_table_on_the_whole_disk(work: Path) -> None:
    plan = await plan_export(ExportOptions(disk="disk.img"), str(work))
    assert (plan.name, plan.size, plan.missing) == ("disk", MIB, None)
    assert plan.table == f"0 {MIB // 512} linear {work}/disk.img 0"


async def test_disk_is_read_and_written_as_it_is(work: Path) -> None:
    def ask(client: PlainClient) -> None:
        assert client.size == MIB
        assert client.read(256, 4) == b"\0\1\2\3"
        client.write(512, b"x" * 512)
        client.flush()

    async with served(disk="disk.img") as recorder:
        assert recorder.uris[0].startswith("nbd+unix:///")
        await in_thread(work, ask)
    assert (work / "disk.img").read_bytes()[512:1024] == b"x" * 512


async def test_read_only_export_refuses_writes(work: Path) -> None:
    def ask(client: PlainClient) -> None:
        assert client.flags & READ_ONLY_FLAG
        with pytest.raises(PlainClientError):
            client.write(0, bytes(512))

    (work / "disk.img").chmod(0o444)
    async with served(disk="disk.img", read_only=True):
        await in_thread(work, ask)


@pytest.mark.parametrize(
    ("size", "options", "reason"),
    [
        (None, {}, "no such file"),
        (0, {}, "disk.img: is empty"),
        (1000, {}, "`truncate -s %512 .*' makes it a little larger"),
        (512, {"name": ""}, "Empty device name"),
        (512, {"name": "a/b"}, "is not allowed"),
        (512, {"listen": ("ftp:x",)}, "for example tcp:127.0.0.1:10809"),
    ],
)
async def test_refusal_says_what_to_do(
    work: Path, size: int | None, options: dict[str, object], reason: str
) -> None:
    (work / "disk.img").unlink()
    if size is not None:
        (work / "disk.img").write_bytes(bytes(size))
    job = ExportJob(ExportOptions(disk="disk.img", **options), Recorder())  # type: ignore[arg-type]
    with pytest.raises(NbdTargetError, match=reason):
        await job.run()


async def test_port_that_is_taken_is_the_only_complaint(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp:127.0.0.1:{taken.getsockname()[1]}"
        job = ExportJob(ExportOptions(disk="disk.img", listen=(address,)), Recorder())
        with pytest.raises(NbdTargetError, match="ddress already in use"):
            await job.run()
    assert "could not be committed" not in caplog.text


@pytest.mark.parametrize(("host", "warns"), [("0.0.0.0", True), ("127.0.0.1", False)])
async def test_address_that_other_machines_can_reach_is_warned_about(
    work: Path, caplog: pytest.LogCaptureFixture, host: str, warns: bool
) -> None:
    async with served(disk="disk.img", listen=(f"tcp:{host}:0",)):
        assert ("NBD without TLS" in caplog.text) == warns
