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
from nbdtarget.devices.helper.device import HelperDevice
from nbdtarget.devices.helper.process import Helper
from nbdtarget.devices.helper.words import parse_configured
from tests.support.clients import needs
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


async def read_when_it_is_back(device: HelperDevice) -> memoryview:
    while True:
        try:
            return await device.read(0, SIZE)
        except DeviceError:
            await asyncio.sleep(0.01)


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
        await until_lost(device)
        with pytest.raises(DeviceError):
            await device.read(0, 512)
        assert await read_when_it_is_back(device) == raw
        assert device.helper_pid not in (None, first)
    assert "qemu-nbd was ended by SIGKILL" in caplog.text
    assert "connected again" in caplog.text


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("qemu:raw:{}/none", "qemu-nbd ended with status 1: .*No such file"),
        ("qemu:qcow2:{}/raw.img", "not in qcow2 format"),
        ("nbdkit:file?file={}/none", "nbdkit ended with status 1: .*No such file"),
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
