# SPDX-License-Identifier: Apache-2.0
"""A clone of a URL: the pin in its metadata, a replaced source, a source that is away, secrets."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nbdtarget.common.errors import DeviceError, NbdTargetError
from nbdtarget.common.permissions import MOVED, OTHER_DISK, Permission
from nbdtarget.devices import resolve
from nbdtarget.devices.http.url_command import set_url_commands
from nbdtarget.devices.ranged import retry
from nbdtarget.dm.mapped_device import MappedDevice
from nbdtarget.dm.registry import Registry
from nbdtarget.porcelain.clone import CloneJob, CloneOptions
from tests.support.clock import settle
from tests.support.image_server import Answer, ImageServer, Request, image_of
from tests.support.patience import attempts
from tests.support.porcelain_clone import Recorder, clone

MIB = 1 << 20
IMAGE = image_of(4 * MIB)
OTHER = IMAGE[::-1]
NR_REGIONS = len(IMAGE) >> 16
# With what a client writes to one region.
WRITTEN = IMAGE[: 3 * MIB] + b"mine" * 16384 + IMAGE[3 * MIB + 65536 :]
SECTORS = len(IMAGE) // 512
ARGS = "128 1 no_hydration 4 hydration_threshold 16 hydration_batch_size 4"


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(retry, "RETRY_S_MIN", 0.0001)
    monkeypatch.setattr(retry, "RETRY_S_MAX", 0.0001)
    monkeypatch.chdir(tmp_path)


@pytest.fixture
async def server() -> AsyncIterator[ImageServer]:
    async with ImageServer(IMAGE) as server:
        yield server


@asynccontextmanager
async def clone_of(
    url: str, path: Path, *permissions: Permission
) -> AsyncIterator[MappedDevice]:
    """The clone that does not hydrate by itself; removed at the end. A test that has failed waits for no source."""
    registry = Registry(resolve)
    try:
        yield await registry.create(
            "c",
            f"0 {SECTORS} clone {path}/meta {path}/dest {url} {ARGS}",
            permissions=frozenset(permissions),
        )
    except BaseException:
        registry.give_up_reads()
        raise
    finally:
        await registry.close()


def make_dest(path: Path) -> None:
    with (path / "dest").open("wb") as file:
        file.truncate(len(IMAGE))


async def copied(device: MappedDevice) -> int:
    nr = await fields_of(device, "regions_hydrated")
    assert isinstance(nr, int)
    return nr


async def fields_of(device: MappedDevice, name: str) -> object:
    (_, fields), *_ = await device.status_by_name()
    return fields[name]


async def readable(device: MappedDevice) -> dict[int, bytes]:
    """The regions that can be read, by number."""
    found = {}
    for nr in range(NR_REGIONS):
        with contextlib.suppress(DeviceError):
            found[nr] = bytes(await device.read(nr << 16, 64 << 10))
    return found


async def until(device: MappedDevice, name: str, value: object) -> None:
    async for _ in attempts():
        if await fields_of(device, name) == value:
            return


async def test_one_line_clones_a_url(server: ImageServer, tmp_path: Path) -> None:
    recorder = Recorder()
    assert (
        await clone(recorder, source=server.url("/a.img?sig=secret"), dest="vm.img")
        == 0
    )
    assert (tmp_path / "vm.img").read_bytes() == IMAGE
    assert "hydrated" in recorder.calls
    assert b"secret" not in (tmp_path / "vm.img.nbdtarget").read_bytes()
    asked = len(server.noted)
    # The second start needs the server no more.
    assert (
        await clone(Recorder(), source=server.url("/a.img?sig=secret"), dest="vm.img")
        == 0
    )
    assert len(server.noted) == asked


async def test_clone_of_a_sparse_image_is_sparse(tmp_path: Path) -> None:
    """A web server does not tell of holes; zeroes take no space on the destination, and replace what lay there."""
    image = bytearray(8 * MIB)
    image[:MIB], image[-MIB:] = IMAGE[:MIB], IMAGE[:MIB]
    for name, before in (("new.img", b""), ("old.img", OTHER)):
        dest = tmp_path / name
        dest.write_bytes(before)
        os.truncate(dest, len(image))
        async with ImageServer(bytes(image)) as server:
            done = await clone(
                Recorder(), source=server.url(), dest=name, overwrite=True
            )
        assert done == 0
        assert dest.read_bytes() == image
        assert 2 * MIB <= dest.stat().st_blocks * 512 < 3 * MIB


async def test_clone_goes_on_after_a_restart_under_another_signature(
    server: ImageServer, tmp_path: Path
) -> None:
    make_dest(tmp_path)
    async with clone_of(server.url("/a?sig=1"), tmp_path) as device:
        await device.prefetch(0, 128 << 10)
        assert await copied(device) == 2
    async with clone_of(server.url("/a?sig=2"), tmp_path) as device:
        assert await copied(device) == 2
        await device.message(0, ["enable_hydration"])
        await until(device, "hydrated_durably", True)
    assert (tmp_path / "dest").read_bytes() == IMAGE


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ("etag", 'its etag is "two", not "one"'),
        ("size", f"its size is {5 * MIB}, not {4 * MIB}"),
        ("weak", "it does not tell its etag any more"),
    ],
)
async def test_other_image_is_refused_at_the_next_start(
    server: ImageServer, tmp_path: Path, changed: str, says: str
) -> None:
    make_dest(tmp_path)
    url = server.url("/a?sig=secret")
    async with clone_of(url, tmp_path) as device:
        await device.write(0, b"mine" * 1024)
    if changed == "etag":
        server.image, server.etag = OTHER, '"two"'
    elif changed == "size":
        server.image += bytes(MIB)
    else:
        server.etag = ""
    with pytest.raises(NbdTargetError) as caught:
        async with clone_of(url, tmp_path):
            pass
    text = str(caught.value)
    assert says in text
    assert "is not the source that" in text
    assert "secret" not in text
    if changed != "weak":
        with pytest.raises(NbdTargetError):
            async with clone_of(url, tmp_path, MOVED):
                pass
    async with clone_of(url, tmp_path, OTHER_DISK) as device:
        assert bytes(await device.read(0, 4)) == b"mine"


async def test_fresh_clone_may_have_any_image(
    server: ImageServer, tmp_path: Path
) -> None:
    """As long as nothing is copied, nothing can be mixed."""
    make_dest(tmp_path)
    async with clone_of(server.url(), tmp_path):
        pass
    server.image, server.etag = OTHER, '"two"'
    async with clone_of(server.url(), tmp_path) as device:
        assert bytes(await device.read(MIB, 512)) == OTHER[MIB : MIB + 512]


@pytest.mark.parametrize("honours_if_match", [True, False])
async def test_replaced_source_stops_the_copy_and_nothing_is_mixed(
    server: ImageServer, tmp_path: Path, honours_if_match: bool
) -> None:
    make_dest(tmp_path)

    def behave(request: Request, answer: Answer) -> None:
        if not honours_if_match and answer.status == 412:
            body = server.image[request.begin : request.end]
            end = request.begin + len(body) - 1
            answer.status, answer.body = 206, body
            answer.headers["Content-Range"] = (
                f"bytes {request.begin}-{end}/{len(IMAGE)}"
            )

    server.behave = behave
    async with clone_of(server.url(), tmp_path) as device:
        await device.prefetch(0, 1 << 20)
        await device.write(3 * MIB, b"mine" * 16384)
        done = await copied(device)
        event_nr = device.event_nr
        server.image, server.etag = OTHER, '"two"'
        await device.message(0, ["enable_hydration"])
        await device.events.wait(event_nr)
        assert 'its etag is "two", not "one"' in str(
            await fields_of(device, "source_changed")
        )
        below = [each for each in device.devices_below() if each.changed]
        assert [each.health.state.value for each in below] == ["lost"]
        await until(device, "regions_hydrating", 0)
        asked = len(server.noted)
        # Copied regions can be read, and the others cannot.
        assert await copied(device) >= done
        good = await readable(device)
        assert len(good) == await copied(device) < NR_REGIONS
        assert all(data == WRITTEN[nr << 16 :][: 64 << 10] for nr, data in good.items())
        await device.flush()
        await device.message(0, ["hydration_threshold", "8"])  # wakes hydration
        await settle(300)
        assert len(server.noted) == asked
        # Only what was under way has failed: the other regions were not even tried.
        errors = await fields_of(device, "errors")
        assert isinstance(errors, int)
        assert errors <= 16
    with pytest.raises(NbdTargetError, match="is not the source that"):
        async with clone_of(server.url(), tmp_path):
            pass
    server.image, server.etag = IMAGE, '"one"'
    async with clone_of(server.url(), tmp_path) as device:
        await device.message(0, ["enable_hydration"])
        await until(device, "hydrated_durably", True)
    assert (tmp_path / "dest").read_bytes() == WRITTEN


async def test_command_ends_and_says_that_the_source_was_replaced(
    server: ImageServer,
) -> None:
    answered = iter(range(1000))

    def behave(_: Request, answer: Answer) -> None:
        # The first answer opens the image.
        if next(answered) > 0:
            answer.status, answer.body = 412, b""

    server.behave = behave
    recorder = Recorder()
    assert await clone(recorder, source=server.url(), dest="vm.img") == 1
    assert "source_changed" in recorder.calls
    assert "hydrated" not in recorder.calls


async def test_source_that_is_away_is_waited_for(
    server: ImageServer, tmp_path: Path
) -> None:
    make_dest(tmp_path)
    async with clone_of(server.url(), tmp_path) as device:
        down = True

        def behave(_: Request, answer: Answer) -> None:
            if down:
                answer.status, answer.body = 503, b""

        server.behave = behave
        event_nr = device.event_nr
        reading = asyncio.create_task(device.read(2 * MIB, 4096))
        await device.events.wait(event_nr)
        assert not reading.done()
        down = False
        assert bytes(await reading) == IMAGE[2 * MIB : 2 * MIB + 4096]
        assert await fields_of(device, "errors") == 0


async def test_message_swaps_the_url_of_a_running_clone(
    server: ImageServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_dest(tmp_path)
    async with clone_of(server.url("/a?sig=old"), tmp_path) as device:

        def behave(request: Request, answer: Answer) -> None:
            if request.target == "/a?sig=old":
                answer.status, answer.body = 403, b""

        server.behave = behave
        event_nr = device.event_nr
        reading = asyncio.create_task(device.read(2 * MIB, 4096))
        await device.events.wait(event_nr)
        assert not reading.done()
        server.etag = '"two"'
        with pytest.raises(NbdTargetError, match="is another image: its etag is"):
            await device.message(0, ["source_url", server.url("/a?sig=new")])
        server.etag = '"one"'
        with pytest.raises(NbdTargetError, match="is no URL of a web server"):
            await device.message(0, ["source_url", "/etc/passwd"])
        await device.message(0, ["source_url", server.url("/a?sig=new")])
        assert bytes(await reading) == IMAGE[2 * MIB : 2 * MIB + 4096]
        # The table goes to a successor with the new URL, and to people without its secret.
        assert "sig=new" in device.table()[0][3]
    assert "sig=" not in caplog.text


async def test_command_line_command_signs_the_url(
    server: ImageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def behave(request: Request, answer: Answer) -> None:
        if request.target != "/a?sig=good":
            answer.status, answer.body = 403, b""

    server.behave = behave
    url = server.url("/a")
    options = CloneOptions(
        source=url,
        dest="vm.img",
        exit_when_hydrated=True,
        url_command=("echo", f"{url}?sig=good"),
    )
    try:
        assert await CloneJob(options, Recorder()).run() == 0
    finally:
        set_url_commands({})
    assert (tmp_path / "vm.img").read_bytes() == IMAGE


async def test_image_under_another_device_is_pinned_too(
    server: ImageServer, tmp_path: Path
) -> None:
    make_dest(tmp_path)
    line = f"0 {SECTORS} clone {tmp_path}/meta {tmp_path}/dest /dev/mapper/l {ARGS}"

    async def started() -> Registry:
        registry = Registry(resolve)
        await registry.create(
            "l", f"0 {SECTORS} linear {server.url()} 0", read_only=True
        )
        try:
            await registry.create("c", line)
        except NbdTargetError:
            await registry.close()
            raise
        return registry

    registry = await started()
    await registry.get("c").write(0, b"mine" * 16384)
    await registry.close()
    await (await started()).close()
    server.image, server.etag = OTHER, '"two"'
    with pytest.raises(NbdTargetError, match='its etag is "two", not "one"'):
        await started()


async def test_status_tells_what_the_source_has_cost(
    server: ImageServer, tmp_path: Path
) -> None:
    make_dest(tmp_path)
    async with clone_of(server.url(), tmp_path) as device:
        await device.read(2 * MIB, 4096)
        assert await fields_of(device, "source_requests") == len(server.noted) - 1
        assert await fields_of(device, "source_retries") == 0
        assert await fields_of(device, "source_bytes") == 256 << 10
        assert await fields_of(device, "source_away_since_s") is None
        assert await fields_of(device, "source_away_s") == 0.0
