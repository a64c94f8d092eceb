# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget clone`: what is refused before anything is changed, and how the job goes."""

import asyncio
import errno
import os
import signal
import socket
from pathlib import Path

import msgspec
import pytest

from nbdtarget.bio import OP_FLUSH, Bio
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control.api import ControlServer
from nbdtarget.control.paths import control_address
from nbdtarget.control.sockets import SocketInUseError
from nbdtarget.control.verbs import Verbs
from nbdtarget.devices import resolve
from nbdtarget.devices.file.device import FileDevice
from nbdtarget.devices.http.url_command import set_url_commands, url_command_for
from nbdtarget.dm.registry import Registry
from nbdtarget.porcelain import job as job_module
from nbdtarget.porcelain.clone import CloneJob, CloneOptions, ClonePlan, plan_clone
from nbdtarget.porcelain.kept import KeptSource
from nbdtarget.porcelain.trace_file import read_trace
from nbdtarget.targets import metadata_io
from nbdtarget.targets.base import StatusFields
from nbdtarget.targets.clone.target import CloneTarget
from nbdtarget_metadata.clone.metadata import CloneMetadata
from tests.support.dm import make_registry
from tests.support.patience import PATIENCE_S
from tests.support.porcelain_clone import Recorder, clone

MIB = 1 << 20
CONTENT = os.urandom(2 * MIB)


@pytest.fixture
def work(tmp_path: Path, runtime: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.delenv("NBDTARGET_CONTROL", raising=False)
    work = tmp_path / "work"
    work.mkdir()
    (work / "source").write_bytes(CONTENT)
    monkeypatch.chdir(work)
    return work


def files(work: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in work.iterdir()}


async def test_everything_is_made_and_hydrated(work: Path, runtime: Path) -> None:
    recorder = Recorder()
    assert await clone(recorder) == 0
    assert recorder.calls == ["serving", "hydrated", "stopping"]
    assert recorder.done[-1] == len(CONTENT)
    assert files(work).keys() == {"source", "dest", "dest.nbdtarget"}
    assert (work / "dest").read_bytes() == CONTENT
    assert list((runtime / "nbdtarget").iterdir()) == []


async def test_a_process_that_takes_over_has_the_url_command(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = "https://h/a.img"
    options = CloneOptions(source=url, dest="dest", url_command=("sign", "a"))
    job = CloneJob(options, Recorder())
    commands = []

    async def take_over(_: object) -> None:
        commands.append(url_command_for(url))

    monkeypatch.setattr(job_module, "maybe_offer", object)
    monkeypatch.setattr(job, "_take_over", take_over)
    try:
        await job._begin()
    finally:
        set_url_commands({})
    assert commands == [("sign", "a")]


async def test_same_command_continues_until_it_is_stopped(work: Path) -> None:
    assert await clone() == 0
    (work / "source").write_bytes(bytes(len(CONTENT)))
    recorder = Recorder(stop_when="hydrated")
    assert await clone(recorder, exit_when_hydrated=False) == 0
    assert recorder.calls == ["serving", "hydrated", "stopping"]
    assert (work / "dest").read_bytes() == CONTENT


@pytest.mark.parametrize("then_linear", [False, True])
async def test_same_command_works_without_the_source_when_all_is_copied(
    work: Path, then_linear: bool
) -> None:
    assert await clone(then_linear=then_linear) == 0
    (work / "source").unlink()
    recorder = Recorder(stop_when="hydrated")
    status = await clone(recorder, exit_when_hydrated=False, then_linear=then_linear)
    assert status == 0
    assert recorder.calls == ["serving", "hydrated", "stopping"]
    assert (work / "dest").read_bytes() == CONTENT


async def test_missing_source_is_named_with_what_must_still_be_copied(
    work: Path,
) -> None:
    assert await clone() == 0
    metadata = await resolve.open_device("dest.nbdtarget")
    steps = CloneMetadata.format(
        device_size=metadata.size,
        region_size=64 << 10,
        target_size=len(CONTENT),
        uuid=bytes(16),
    )
    await metadata.write_zeroes(0, metadata.size)
    core = await metadata_io.run(metadata, steps)
    core.set_hydrated(0, 1)
    transaction = core.pre_commit()
    assert transaction is not None
    await metadata_io.run(metadata, transaction.journal())
    await metadata_io.run(metadata, transaction.superblock())
    await metadata.close()
    (work / "source").unlink()
    nr_regions = core.nr_regions
    left = f"{nr_regions - 1} of {nr_regions} regions .* must still be copied from it"
    with pytest.raises(NbdTargetError, match=f"/source: .*; {left}"):
        await clone()


@pytest.mark.parametrize("exit_when_hydrated", [True, False])
async def test_clone_that_becomes_linear_is_reported_as_hydrated(
    work: Path, exit_when_hydrated: bool
) -> None:
    for _ in range(2):  # the same line over what is complete, too
        recorder = Recorder(stop_when="" if exit_when_hydrated else "hydrated")
        assert (
            await clone(
                recorder, then_linear=True, exit_when_hydrated=exit_when_hydrated
            )
            == 0
        )
        assert recorder.calls == ["serving", "hydrated", "stopping"]
        assert recorder.done[-1] == len(CONTENT)
        assert (work / "dest").read_bytes() == CONTENT


async def test_words_of_the_table_line_say_what_was_asked_for(work: Path) -> None:
    options = CloneOptions(
        source="source",
        dest="dest",
        hydrate_on_read=True,
        then_linear=True,
        hydration=False,
        hydration_rate=5 * MIB,
    )
    plan = await plan_clone(options, str(work))
    assert (
        plan.table.split()[6:]
        == (
            "128 3 no_hydration hydrate_on_read then_linear 6 hydration_threshold 256"
            f" hydration_batch_size 64 hydration_rate {5 * MIB}"
        ).split()
    )


async def test_rate_slows_the_copying_down(work: Path) -> None:
    recorder = Recorder(stop_when="serving")
    assert await clone(recorder, hydration_rate=1, exit_when_hydrated=False) == 0
    assert recorder.done[-1] < len(CONTENT)


async def test_sparse_and_zeroed_destinations_are_taken(work: Path) -> None:
    (work / "dest").write_bytes(bytes(4 * MIB))
    (work / "dest.nbdtarget").write_bytes(bytes(4 * MIB))
    assert await clone() == 0
    assert (work / "dest").read_bytes() == CONTENT + bytes(2 * MIB)


async def test_paths_with_blanks(work: Path) -> None:
    (work / "my source").write_bytes(CONTENT)
    assert await clone(source="my source", dest="my\\ dest") == 0
    assert (work / "my\\ dest").read_bytes() == CONTENT


async def test_source_of_an_odd_size_is_filled_up_with_zeroes(
    work: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (work / "odd").write_bytes(CONTENT[:1000])
    assert await clone(source="odd") == 0
    assert (work / "dest").read_bytes() == CONTENT[:1000] + bytes(24)
    assert "odd: its size, 1000 bytes, is no multiple of 512" in caplog.text


async def test_raw_says_that_a_header_means_nothing(work: Path) -> None:
    content = b"QFI\xfb" + CONTENT[4:]
    (work / "image").write_bytes(content)
    assert await clone(source="raw:image", dest="raw:dest") == 0
    assert (work / "dest").read_bytes() == content
    assert files(work).keys() == {"source", "image", "dest", "dest.nbdtarget"}


async def test_overwrite_starts_anew(work: Path) -> None:
    (work / "dest").write_bytes(b"x" * len(CONTENT))
    assert await clone(overwrite=True) == 0
    assert (work / "dest").read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("made", "options", "reason"),
    [
        ({}, {"source": "nowhere"}, "nowhere"),
        ({}, {"source": "."}, "work"),
        ({"dest": b"QFI\xfb" + bytes(2 * MIB)}, {}, "raw:"),
        ({"dest": b"QFI\xfb" + bytes(2 * MIB)}, {"overwrite": True}, "raw:"),
        (
            {"image": b"QFI\xfb\0\0\0\3" + bytes(MIB)},
            {"source": "image"},
            "a qcow2 image",
        ),
        (
            {"image": b"\xfd7zXZ\0" + bytes(MIB)},
            {"source": "image"},
            "write xz:/",
        ),
        ({"empty": b""}, {"source": "empty"}, "empty"),
        ({}, {"dest": "no/such/dest"}, "no/such/dest"),
        ({}, {"dest": "source"}, "is both"),
        ({}, {"metadata": "source"}, "is both"),
        ({}, {"metadata": "dest"}, "is both"),
        ({}, {"metadata": "no/such"}, "no/such"),
        ({"dest": bytes(MIB)}, {}, "too small"),
        ({"dest": b"x" * 2 * MIB}, {}, "holds data"),
        ({"dest": bytes(2 * MIB - 1) + b"x"}, {}, "holds data"),
        ({"dest.nbdtarget": b"x" * MIB}, {}, "dest, which is missing"),
        ({"dest.nbdtarget": b"x" * MIB, "dest": bytes(2 * MIB)}, {}, "metadata"),
        ({"dest.nbdtarget": bytes(512), "dest": bytes(2 * MIB)}, {}, "metadata"),
        ({"dest.nbdtarget": bytes(512)}, {}, "metadata"),
        ({}, {"listen": ("nonsense",)}, "nonsense"),
        ({}, {"listen": ("unix:source",)}, "not a socket"),
        ({}, {"listen": ("unix:ok.sock", "tcp:host:99999")}, "tcp:host:99999"),
        ({}, {"dest": "memory:4M"}, "--metadata"),
        ({}, {"dest": "/dev/nosuch"}, "--metadata"),
        ({}, {"dest": "ftp://x/y", "metadata": "m"}, "ftp"),
    ],
)
async def test_refusal_changes_nothing(
    work: Path, made: dict[str, bytes], options: dict[str, object], reason: str
) -> None:
    for name, content in made.items():
        (work / name).write_bytes(content)
    before = files(work)
    with pytest.raises(NbdTargetError) as caught:
        await clone(**options)  # type: ignore[arg-type]  # parameters of many types
    assert reason in str(caught.value)
    assert "\n" not in str(caught.value)
    assert files(work) == before


async def test_destination_in_use_is_refused(work: Path) -> None:
    (work / "dest").write_bytes(bytes(2 * MIB))
    held = await resolve.open_device(str(work / "dest"), read_only=False)
    before = files(work)
    with pytest.raises(NbdTargetError, match="dest"):
        await clone()
    assert files(work) == before
    await held.close()


async def test_another_server_has_the_control_socket(work: Path) -> None:
    registry, _ = make_registry()
    control = ControlServer(Verbs(registry), control_address(None))
    await control.start()
    recorder = Recorder()
    assert await clone(recorder) == 0
    assert recorder.calls[0] == "serving"
    with pytest.raises(SocketInUseError):
        await clone(dest="other", control=str(control.address))
    assert not (work / "other").exists()
    await control.close()


async def test_plan_changes_nothing_and_names_the_export(work: Path) -> None:
    before = files(work)
    plan = await plan_clone(
        CloneOptions(source="source", dest="my.disk.img", region_size=4096), str(work)
    )
    assert (plan.name, plan.size, plan.make_dest) == ("my.disk", 2 * MIB, True)
    assert plan.table == (
        f"0 4096 clone {work}/my.disk.img.nbdtarget {work}/my.disk.img {work}/source 8 0"
        " 4 hydration_threshold 4096 hydration_batch_size 1024"
    )
    assert files(work) == before


async def test_metadata_that_cannot_be_written_any_more_is_reported(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = CloneTarget.status_fields

    def broken(self: CloneTarget) -> StatusFields:
        return told(self) | {"mode": "ro"}

    monkeypatch.setattr(CloneTarget, "status_fields", broken)
    recorder = Recorder()
    assert await clone(recorder) == 1
    assert recorder.calls == ["serving", "failed", "stopping"]


async def test_end_whose_last_commit_fails_is_told_by_the_exit_status(
    work: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    runtime: Path,
) -> None:
    """As a cache does it."""

    class FailAtTheEnd(Recorder):
        def stopping(self) -> None:
            super().stopping()
            submit = FileDevice.submit

            def fails(device: FileDevice, bio: Bio) -> None:
                if bio.op == OP_FLUSH and device.name.endswith("/dest"):
                    bio.end(errno.EIO)
                else:
                    submit(device, bio)

            monkeypatch.setattr(FileDevice, "submit", fails)

    assert await clone(FailAtTheEnd("serving"), exit_when_hydrated=False) == 1
    assert f"{work}/dest: flush" in caplog.text
    monkeypatch.undo()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.chdir(work)
    assert await clone() == 0
    assert (work / "dest").read_bytes() == CONTENT


async def test_files_of_a_faster_process_are_left_alone(
    work: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def plan_and_be_late(
        options: CloneOptions, directory: str, kept: KeptSource | None
    ) -> ClonePlan:
        plan = await plan_clone(options, directory, kept)
        (work / "dest").write_bytes(b"another clone's")
        return plan

    monkeypatch.setattr("nbdtarget.porcelain.clone.plan_clone", plan_and_be_late)
    with pytest.raises(NbdTargetError, match="dest"):
        await clone()
    assert (work / "dest").read_bytes() == b"another clone's"
    assert not (work / "dest.nbdtarget").exists()


async def test_new_files_are_removed_when_the_address_is_taken(work: Path) -> None:
    (work / "dest").write_bytes(bytes(2 * MIB))
    before = files(work)
    with pytest.raises(NbdTargetError, match="source"):
        await clone(listen=("unix:ok.sock", "unix:source"))
    assert files(work) == before


async def test_signal_before_the_first_client_ends_in_order(work: Path) -> None:
    # The source takes the connection and says nothing.
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind("silent.sock")
        silent.listen()
        before = sorted(os.listdir(work))
        asyncio.get_running_loop().call_later(
            0.05, os.kill, os.getpid(), signal.SIGTERM
        )
        recorder = Recorder()
        uri = f"nbd+unix:///?socket={work}/silent.sock"
        assert await clone(recorder, source=uri) == 0
    assert recorder.calls == []
    assert sorted(os.listdir(work)) == before


class UnreadRecorder(Recorder):
    """One whose reader has gone away."""

    def progress(self, done: int, size: int) -> None:
        raise BrokenPipeError

    def hydrated(self) -> None:
        raise BrokenPipeError


async def test_job_ends_well_when_its_progress_is_not_read(work: Path) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await clone(UnreadRecorder()) == 0
    assert (work / "dest").read_bytes() == CONTENT


class DeafRecorder(Recorder):
    """One to whom nothing can be said from the beginning."""

    def serving(self, plan: ClonePlan, uris: list[str]) -> None:
        raise BrokenPipeError


async def test_broken_pipe_does_not_remove_a_disk_that_clients_may_use(
    work: Path,
) -> None:
    async with asyncio.timeout(PATIENCE_S):
        assert await clone(DeafRecorder()) == 0
    assert (work / "dest").read_bytes() == CONTENT


async def test_another_process_goes_on_with_order_and_trace(work: Path) -> None:
    (work / "order").write_text("nbdtarget-trace 1\n1048576 65536\n")
    options = CloneOptions(
        source="source",
        dest="dest",
        hydration=False,
        record_trace="boot.trace",
        hydrate_order="order",
    )
    (work / "dest").touch()
    os.truncate("dest", len(CONTENT))
    old = CloneJob(options, Recorder())
    plan = await old._plan()
    registry = Registry(resolve)
    try:
        device = await registry.create(plan.name, plan.table)
        old._loaded(device)
        await device.read(0, 4096)
        moved = msgspec.msgpack.encode(old._plan_now(plan))
        await registry.remove(plan.name)
        # The next process.
        (work / "order").unlink()
        new = CloneJob(options, Recorder())
        device = await registry.create(plan.name, plan.table)
        new._taken_over(msgspec.msgpack.decode(moved, type=ClonePlan))
        new._loaded(device)
        assert device.active is not None
        (target,) = device.active.targets
        assert isinstance(target, CloneTarget)
        assert list(target._hydration._first) == [(16, 17)]
        await device.read(65536, 4096)
        await new._ending(device, plan)
        assert read_trace("boot.trace") == [(0, 131072)]
        assert new._plan_now(plan).recorded == ((0, 131072),)
        assert new._plan_now(plan).order == ((MIB, MIB + 65536),)
    finally:
        await registry.close()
