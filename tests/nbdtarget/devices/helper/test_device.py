# SPDX-License-Identifier: Apache-2.0
"""HelperDevice with the real programs: what is read, holes, what happens when the program dies, and that no port is opened."""

import asyncio
import os
import random
import signal
import subprocess
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices import resolve
from nbdtarget.devices.base import EXTENT_DATA, EXTENT_ZERO
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.helper.device import HelperDevice
from nbdtarget.devices.helper.process import Helper
from nbdtarget.devices.helper.words import parse_configured, parse_qemu, qemu_name
from nbdtarget.devices.nbd import device as nbd_device
from tests.support.clients import needs
from tests.support.image_server import ImageServer
from tests.support.processes import wait_for_socket

MIB = 1 << 20
SIZE = 16 * MIB
NBD_PORT_HEX = f"{10809:04X}"

pytestmark = needs("qemu-nbd", "qemu-img", "nbdkit", "xz")


@pytest.fixture
def raw(tmp_path: Path) -> bytes:
    """A disk of which the first 2 MiB are data and the rest is a hole; raw.img has it."""
    content = random.Random(5).randbytes(2 * MIB) + bytes(SIZE - 2 * MIB)
    with (tmp_path / "raw.img").open("wb") as file:
        file.write(content[: 2 * MIB])
        file.truncate(SIZE)
    return content


def convert(work: Path, format_: str, name: str, *options: str) -> None:
    argv = [
        "qemu-img",
        "convert",
        "-f",
        "raw",
        "-O",
        format_,
        *options,
        "raw.img",
        name,
    ]
    subprocess.run(argv, cwd=work, check=True, capture_output=True)


def run(line: str, work: Path) -> None:
    subprocess.run(line.split(), cwd=work, check=True)


@contextmanager
def written_to(image: str, socket: Path) -> Iterator[None]:
    """Meanwhile another program has the image open for writing."""
    argv = ["qemu-nbd", "-t", "-f", "qcow2", "-k", str(socket), image]
    with subprocess.Popen(argv, stderr=subprocess.DEVNULL) as writer:
        try:
            assert wait_for_socket(socket)
            yield
        finally:
            writer.terminate()


async def until_lost(device: HelperDevice) -> None:
    lost = asyncio.Event()
    device.health.watchers.append(lost.set)
    if device.health.is_usable:
        await lost.wait()


@asynccontextmanager
async def opened(name: str) -> AsyncIterator[HelperDevice]:
    device = await resolve.open_device(name, read_only=True)
    assert isinstance(device, HelperDevice)
    try:
        yield device
    finally:
        pid = device.helper_pid
        await device.close()
        assert pid is None or not runs(pid)


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def listens_on_nbd_port() -> bool:
    """Whether anything on this machine listens on TCP port 10809, of IPv4 or IPv6."""
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with open(table) as file:
            for line in file.readlines()[1:]:
                words = line.split()
                if words[1].endswith(f":{NBD_PORT_HEX}") and words[3] == "0A":
                    return True
    return False


IMAGES = [
    ("qcow2", ("-c",)),
    ("qcow2", ()),
    ("vmdk", ("-o", "subformat=streamOptimized")),
    ("vhdx", ()),
    ("vdi", ()),
]


@pytest.mark.parametrize(
    ("format_", "options"),
    IMAGES,
    ids=["qcow2-compressed", "qcow2", "vmdk-stream", "vhdx", "vdi"],
)
async def test_image_reads_as_the_disk_in_it(
    tmp_path: Path, raw: bytes, format_: str, options: tuple[str, ...]
) -> None:
    convert(tmp_path, format_, "image", *options)
    async with opened(f"qemu:{format_}:{tmp_path}/image") as device:
        assert (device.size, device.read_only) == (SIZE, True)
        assert await device.read(0, SIZE) == raw
        assert device.nr_connections == 4
        assert await device.measure() == SIZE
        extents = await device.extents(0, SIZE)
        assert extents[0].flags == EXTENT_DATA
        if format_ != "vhdx":  # it tells of no holes
            assert extents[-1].flags & EXTENT_ZERO
            assert extents[-1].length >= SIZE - 3 * MIB
        evidence = await device.identify("source")
        assert evidence.ids == (f"format={format_}", f"image={tmp_path}/image")
        assert evidence.mtime_ns == os.stat(tmp_path / "image").st_mtime_ns
        assert not device.may_be_container


async def test_backing_file_is_read_only_if_it_is_allowed(
    tmp_path: Path, raw: bytes
) -> None:
    convert(tmp_path, "qcow2", "base")
    run("qemu-img create -q -f qcow2 -b base -F qcow2 top", tmp_path)
    name = f"qemu:qcow2:{tmp_path}/top"
    with pytest.raises(ResolveError, match="refers to the backing file base"):
        await resolve.open_device(name, read_only=True)
    async with opened(f"{name}#allow=references") as device:
        assert await device.read(0, SIZE) == raw


@pytest.mark.parametrize(
    "name",
    ["nbdkit:file?file={}/raw.img", "nbdkit:file?file={}/raw.img.xz&filter=xz"],
    ids=["file", "xz"],
)
async def test_plugin_of_nbdkit(tmp_path: Path, raw: bytes, name: str) -> None:
    if "xz" in name:
        run("xz -0 -k raw.img", tmp_path)
    async with opened(name.format(tmp_path)) as device:
        assert await device.read(0, SIZE) == raw
        assert (await device.identify("source")).ids[0] == "plugin=file"


async def test_nothing_listens_on_a_port(tmp_path: Path, raw: bytes) -> None:
    if listens_on_nbd_port():
        pytest.skip("another program of this machine listens on TCP port 10809")
    for name in (
        f"qemu:raw:{tmp_path}/raw.img",
        f"nbdkit:file?file={tmp_path}/raw.img",
    ):
        async with opened(name) as device:
            assert await device.read(0, 512) == raw[:512]
            assert not listens_on_nbd_port()


async def test_program_that_is_killed_is_started_again(
    tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    async with opened(f"qemu:raw:{tmp_path}/raw.img") as device:
        first = device.helper_pid
        assert first is not None
        os.kill(first, signal.SIGKILL)
        # No read fails: reads wait until the program has been started again.
        assert await device.read(0, SIZE) == raw
        assert device.helper_pid not in (None, first)
    assert "qemu-nbd was ended by SIGKILL" in caplog.text
    assert "connected again" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qemu:raw:{}/none", "No such file"),
        ("qemu:qcow2:{}/raw.img", "not in qcow2 format"),
        ("nbdkit:file?file={}/none", "No such file"),
        ("nbdkit:split?file={}/none", "nbdkit ended with status 1: .*No such file"),
        ("nbdkit:file", "nbdkit ended with status 1"),
    ],
)
async def test_what_cannot_be_opened_is_one_line_with_the_last_words(
    tmp_path: Path, raw: bytes, name: str, reason: str
) -> None:
    assert raw
    with pytest.raises(ResolveError, match=reason) as caught:
        await resolve.open_device(name.format(tmp_path), read_only=True)
    assert "\n" not in str(caught.value)


async def test_program_that_cannot_be_started_is_tried_less_and_less_often(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    delays: list[float] = []

    async def sleep(delay_s: float) -> None:
        delays.append(delay_s)
        await asyncio.sleep(0)

    start = Helper.start

    async def fails(helper: Helper) -> None:
        if len(delays) < 8:
            raise ResolveError("d", "cannot be started")
        await start(helper)

    async with opened(f"qemu:raw:{tmp_path}/raw.img") as device:
        assert device.helper_pid is not None
        monkeypatch.setattr(nbd_device, "sleep", sleep)
        monkeypatch.setattr(Helper, "start", fails)
        os.kill(device.helper_pid, signal.SIGKILL)
        assert await device.read(0, 512) == raw[:512]
    longest = nbd_device.RECONNECT_S_MAX
    assert delays[:8] == [0.25, 0.5, 1.0, 2.0, 4.0, longest, longest, longest]
    assert set(delays[8:]) <= {
        longest
    }  # an attempt may still meet the one that was killed


async def test_image_that_was_replaced_while_its_program_was_away_is_never_read(
    tmp_path: Path, raw: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    convert(tmp_path, "qcow2", "image")
    convert(tmp_path, "qcow2", "other", "-c")
    async with opened(f"qemu:qcow2:{tmp_path}/image") as device:
        assert await device.read(0, 512) == raw[:512]
        pid = device.helper_pid
        assert pid is not None
        (tmp_path / "other").rename(tmp_path / "image")
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DeviceError):
            await device.read(0, 512)
        assert device.changed.startswith("the image was replaced or written to: its ")
        assert device.health.state is HealthState.LOST
        with pytest.raises(DeviceError):
            await device.read(512, 512)
        assert await device.reopened(device.name, read_only=True) is None
        assert not device.looks_for_a_server
    assert "nothing more is read from it" in caplog.text


async def test_image_can_be_opened_again_until_it_is_replaced(
    tmp_path: Path, raw: bytes
) -> None:
    convert(tmp_path, "qcow2", "image")
    convert(tmp_path, "qcow2", "other", "-c")
    async with opened(f"qemu:qcow2:{tmp_path}/image") as device:
        pid = device.helper_pid
        await device.check_again()
        assert device.helper_pid == pid
        (tmp_path / "other").rename(tmp_path / "image")
        with pytest.raises(ResolveError, match="was replaced or written to: its "):
            await device.check_again()
        assert device.health.state is HealthState.OK
        assert await device.read(0, 512) == raw[:512]


async def test_image_that_is_replaced_while_it_is_opened_is_refused(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "other").write_bytes(raw)
    start = Helper.start

    async def late(helper: Helper) -> None:
        (tmp_path / "other").rename(tmp_path / "raw.img")
        await start(helper)

    monkeypatch.setattr(Helper, "start", late)
    with pytest.raises(ResolveError, match="the image is being changed: its place is"):
        await resolve.open_device(f"qemu:raw:{tmp_path}/raw.img", read_only=True)


async def test_reads_that_wait_are_given_up_when_the_server_is_to_stop(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(f"qemu:raw:{tmp_path}/raw.img") as device:
        monkeypatch.setenv("PATH", "/nonexistent")  # it cannot be started again
        assert device.helper_pid is not None
        os.kill(device.helper_pid, signal.SIGKILL)
        await until_lost(device)
        reading = asyncio.ensure_future(device.read(0, 512))
        await asyncio.sleep(0)
        assert (reading.done(), device.nr_in_flight) == (False, 1)
        device.give_up_reads()
        with pytest.raises(DeviceError):
            await reading


async def test_read_waits_no_longer_than_the_name_says(
    tmp_path: Path, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with opened(f"qemu:raw:{tmp_path}/raw.img#source-timeout=1") as device:
        monkeypatch.setenv("PATH", "/nonexistent")
        assert device.helper_pid is not None
        os.kill(device.helper_pid, signal.SIGKILL)
        with pytest.raises(DeviceError):
            await device.read(0, 512)


async def test_image_on_a_web_server(tmp_path: Path, raw: bytes) -> None:
    convert(tmp_path, "qcow2", "image", "-c")
    async with ImageServer((tmp_path / "image").read_bytes()) as server:
        url = server.url("/a.qcow2?sig=hidden")
        async with opened(qemu_name("qcow2", url)) as device:
            assert device.size == SIZE
            assert await device.read(0, SIZE) == raw
            assert "hidden" not in device.name
            assert parse_qemu(device.secret_name).container == url
            assert (await device.extents(0, SIZE))[-1].flags & EXTENT_ZERO
            evidence = await device.identify("source")
            place = server.url("/a.qcow2")
            assert evidence.ids == ("format=qcow2", f"url={place}", 'etag="one"')
            assert evidence.is_pinned
            assert device.traffic is not None
            assert device.traffic.requests == len(server.noted) - 1  # opening is none
            # The helper may be killed: its container stays.
            assert device.helper_pid is not None
            os.kill(device.helper_pid, signal.SIGKILL)
            assert await device.read(MIB, MIB) == raw[MIB : 2 * MIB]


async def test_image_on_a_web_server_that_was_replaced_is_never_read(
    tmp_path: Path, raw: bytes
) -> None:
    convert(tmp_path, "qcow2", "image")
    async with (
        ImageServer((tmp_path / "image").read_bytes()) as server,
        opened(qemu_name("qcow2", server.url())) as device,
    ):
        assert await device.read(0, 512) == raw[:512]
        server.etag = '"two"'
        with pytest.raises(DeviceError):
            await device.read(MIB, MIB)
        assert "its etag is" in device.changed
        with pytest.raises(DeviceError):
            await device.read(0, 512)


async def test_image_on_a_web_server_by_another_url(tmp_path: Path, raw: bytes) -> None:
    convert(tmp_path, "qcow2", "image")
    image = (tmp_path / "image").read_bytes()
    async with (
        ImageServer(image) as server,
        ImageServer(image) as other,
        opened(qemu_name("qcow2", server.url())) as device,
    ):
        await device.use_name(other.url("/there"))
        await server.stop()
        assert device.name == qemu_name("qcow2", other.url("/there"))
        assert await device.read(MIB, MIB) == raw[MIB : 2 * MIB]
        other.etag = '"two"'
        with pytest.raises(ResolveError, match="another image"):
            await device.use_name(other.url("/x"))
        with pytest.raises(ResolveError, match="no name of the same image"):
            await device.use_name(f"qemu:raw:{other.url('/x')}")


async def test_image_on_a_web_server_that_names_another_is_refused(
    tmp_path: Path, raw: bytes
) -> None:
    convert(tmp_path, "qcow2", "base")
    run("qemu-img create -q -f qcow2 -b base -F qcow2 top", tmp_path)
    async with ImageServer((tmp_path / "top").read_bytes()) as server:
        with pytest.raises(ResolveError, match="refers to the backing file base"):
            await resolve.open_device(qemu_name("qcow2", server.url()), read_only=True)
    convert(tmp_path, "vmdk", "vmdk", "-o", "subformat=streamOptimized")
    async with (
        ImageServer((tmp_path / "vmdk").read_bytes()) as server,
        opened(qemu_name("vmdk", server.url())) as device,
    ):
        assert await device.read(0, SIZE) == raw


async def test_program_that_speaks_no_nbd_is_ended(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from nbdtarget.devices.helper import device as module

    monkeypatch.setattr(module, "ANSWER_S_MAX", 0.3)
    pids: list[int] = []
    start = Helper.start

    async def noted(helper: Helper) -> None:
        await start(helper)
        assert helper.pid is not None
        pids.append(helper.pid)

    monkeypatch.setattr(Helper, "start", noted)
    words = parse_configured("helper:x", {"x": ("sleep", "600")})
    with pytest.raises(ResolveError, match="sleep does not answer within"):
        await module.open_helper(words, read_only=True)
    assert len(pids) == 1
    assert not runs(pids[0])


async def test_image_that_a_machine_writes_to_is_refused_in_one_line(
    tmp_path: Path, raw: bytes
) -> None:
    convert(tmp_path, "qcow2", "image")
    image = f"{tmp_path}/image"
    with written_to(image, tmp_path / "s"):
        with pytest.raises(ResolveError, match="lock") as caught:
            await resolve.open_device(f"qemu:qcow2:{image}", read_only=True)
        assert "\n" not in str(caught.value)
