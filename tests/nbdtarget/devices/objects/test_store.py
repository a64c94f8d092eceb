# SPDX-License-Identifier: Apache-2.0
"""ObjectStore against a store that misbehaves, against moto, and against one that knows no ranges (rclone serve s3)."""

import asyncio
import shutil
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

import pytest

pytest.importorskip("obstore", reason="the package obstore is missing")

from nbdtarget.common.errors import DeviceError, ResolveError
from nbdtarget.devices.health import HealthState
from nbdtarget.devices.http.url_command import set_url_commands
from nbdtarget.devices.objects import store as module
from nbdtarget.devices.ranged import fetcher as fetcher_module
from nbdtarget.devices.ranged import retry
from nbdtarget.devices.ranged.device import RangedDevice
from nbdtarget.devices.resolve import open_device
from tests.support.image_server import Answer, ImageServer, Request, image_of

MIB = 1 << 20
IMAGE = image_of(3 * MIB)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """No test waits for a time to pass, and none has credentials of the machine."""
    monkeypatch.setattr(retry, "RETRY_S_MIN", 0.0001)
    monkeypatch.setattr(retry, "RETRY_S_MAX", 0.0001)
    monkeypatch.setattr(fetcher_module, "RENEW_S_MIN", 0.0)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "id")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "topsecret")
    for name in (
        "http_proxy",
        "https_proxy",
        "HTTP_PROXY",
        "HTTPS_PROXY",
        "AWS_SESSION_TOKEN",
    ):
        monkeypatch.delenv(name, raising=False)


def name_on(server: ImageServer, options: str = "") -> str:
    endpoint = server.url("").rstrip("/")
    return f"s3://bucket/dir/a%20b.img#region=us-east-1&endpoint={endpoint}{options}"


@asynccontextmanager
async def device_on(name: str) -> AsyncIterator[RangedDevice]:
    device = await open_device(name, read_only=True)
    assert isinstance(device, RangedDevice)
    try:
        yield device
    finally:
        await device.close()


async def refused(name: str) -> str:
    with pytest.raises(ResolveError) as caught:
        await open_device(name, read_only=True)
    assert "topsecret" not in str(caught.value)
    return str(caught.value)


def change(
    status: int = 0, body: bytes | None = None, **headers: str
) -> Callable[[Answer], None]:
    def changed(answer: Answer) -> None:
        answer.status = status or answer.status
        answer.body = answer.body if body is None else body
        answer.headers |= {
            key.replace("_", "-"): value for key, value in headers.items()
        }

    return changed


def once(
    changed: Callable[[Answer], object], nr: int = 1
) -> Callable[[Request, Answer], None]:
    counted = iter(range(1 << 30))

    def behave(_: Request, answer: Answer) -> None:
        if next(counted) == nr:
            changed(answer)

    return behave


async def test_object_is_read_by_ranges_that_name_the_pinned_one() -> None:
    async with ImageServer(IMAGE) as server, device_on(name_on(server)) as device:
        assert device.size == len(IMAGE)
        assert bytes(await device.read(0, len(IMAGE))) == IMAGE
        assert {request.target for request in server.noted} == {"/bucket/dir/a%20b.img"}
        assert {request.method for request in server.noted} == {"GET"}
        assert {request.headers.get("if-match") for request in server.noted[1:]} == {
            '"one"'
        }
        assert all("authorization" in request.headers for request in server.noted)
        found = await device.identify("source")
        assert 'etag="one"' in found.ids
        assert "url=s3://bucket/dir/a%20b.img" in found.ids


def hang_up(after: int) -> Callable[[Answer], None]:
    def changed(answer: Answer) -> None:
        answer.sends = after

    return changed


@pytest.mark.parametrize(
    "changed",
    [
        *(change(status, b"") for status in (408, 425, 429, 500, 503, 404)),
        change(200, IMAGE, Content_Range=""),
        change(403, b"<Error><Code>ExpiredToken</Code></Error>"),
        change(400, b"<Error><Code>ExpiredToken</Code></Error>"),
        hang_up(0),
        hang_up(100 << 10),
        change(Content_Range="bytes 0-262143/3145728"),
        change(Content_Encoding="gzip"),
        change(ETag=""),
    ],
    ids=range(14),
)
async def test_failed_answers_are_tried_again_and_no_byte_of_them_is_used(
    changed: Callable[[Answer], None],
) -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(changed)
        async with device_on(name_on(server)) as device:
            assert bytes(await device.read(MIB, MIB)) == IMAGE[MIB : 2 * MIB]
            assert device.traffic.retries == 1
            assert device.health.state is HealthState.OK
            # A body that broke off is asked for by us, with If-Match, and not by the library without.
            assert all("if-match" in request.headers for request in server.noted[1:])


@pytest.mark.parametrize(
    "changed",
    [change(412, b""), change(ETag='"two"'), change(Content_Range="bytes 1048576-1310719/3145729"), change(416, b"")],
    ids=["412", "etag", "size", "416"],
)  # fmt: skip
async def test_replaced_object_is_noticed_at_once(
    changed: Callable[[Answer], None],
) -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(changed)
        async with device_on(name_on(server)) as device:
            with pytest.raises(DeviceError):
                await device.read(MIB, 4096)
            assert device.changed.startswith("it was replaced")
            assert device.health.state is HealthState.LOST


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change(200, IMAGE, Content_Range=""), "the store does not support ranges"),
        (change(404, b""), "the store has no such object (status 404)"),
        (change(416, b"", Content_Range="bytes */0"), "is empty"),
        (change(302, b"", Location="http://h/topsecret"), "the store does not answer"),
        (change(Content_Encoding="gzip"), "the object is encoded (gzip), not as it is"),
    ],
    ids=range(5),
)
async def test_refused_at_open(
    changed: Callable[[Answer], None], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nbdtarget.devices.ranged import device as device_module

    async def is_over(_: float) -> None:
        raise TimeoutError

    monkeypatch.setattr(device_module, "sleep", is_over)
    async with ImageServer(IMAGE) as server:
        server.behave = lambda _, answer: changed(answer)
        assert says in await refused(name_on(server))


async def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_obstore_installed", lambda: False)
    text = await refused("s3://bucket/a.img")
    assert text == (
        "s3://bucket/a.img: needs the package obstore: pip install 'nbdtarget[objects]'"
    )


async def test_credentials_of_a_command_are_renewed_when_they_end(
    tmp_path: Path,
) -> None:
    """They live for two seconds, by their own word; each is asked for once."""
    count = tmp_path / "count"
    count.write_text("")
    script = tmp_path / "credentials.py"
    script.write_text(
        "import datetime, json\n"
        f"with open({str(count)!r}, 'a') as file: file.write('x')\n"
        f"nr = len(open({str(count)!r}).read())\n"
        "end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=2)\n"
        "print(json.dumps({'AccessKeyId': f'id{nr}', 'SecretAccessKey': 'topsecret',"
        " 'SessionToken': f'token{nr}', 'Expiration': end.isoformat()}))\n"
    )
    set_url_commands({"s3://bucket/dir/a%20b.img": [sys.executable, str(script)]})
    try:
        async with ImageServer(IMAGE) as server:
            valid = {"token1"}

            def behave(request: Request, answer: Answer) -> None:
                if request.headers["x-amz-security-token"] not in valid:
                    change(403, b"<Error><Code>ExpiredToken</Code></Error>")(answer)

            server.behave = behave
            async with device_on(name_on(server)) as device:
                await device.read(MIB, 512)
                # The two seconds are over, says the store, sooner than our clock.
                nr = len(count.read_text())
                valid = {f"token{each}" for each in range(nr + 1, nr + 100)}
                assert (
                    bytes(await device.read(2 * MIB, 512))
                    == IMAGE[2 * MIB : 2 * MIB + 512]
                )
                assert device.traffic.renewals == 1
                assert device.health.last_error == ""
    finally:
        set_url_commands({})


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    trustme = pytest.importorskip("trustme")
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    async with ImageServer(IMAGE, context) as server:
        async with device_on(name_on(server, f"&ca={ca}")) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
        assert "cannot be read" in await refused(name_on(server, "&ca=/missing"))


@contextmanager
def process(argv: list[str], port: int) -> Iterator[None]:
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(2000):
            with socket.socket() as client:
                if client.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert child.poll() is None, "it ended"
            pause()
        yield
    finally:
        child.kill()
        child.wait()


def pause() -> None:
    """A process has no event that says when it listens."""
    import time

    time.sleep(0.01)


def free_port() -> int:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port: int = held.getsockname()[1]
        return port


async def test_moto_is_read_and_a_new_upload_is_noticed() -> None:
    pytest.importorskip("moto", reason="the package moto is missing")
    import obstore
    from obstore.store import S3Store

    port = free_port()
    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with process(argv, port):
        endpoint = f"http://127.0.0.1:{port}"
        bucket = S3Store(
            "bucket",
            config={"endpoint": endpoint, "region": "us-east-1", "virtual_hosted_style_request": False},
            client_options={"allow_http": True},
        )  # fmt: skip
        async with asyncio.timeout(20):
            await _make_bucket(port)
            await obstore.put_async(bucket, "a.img", IMAGE)
            name = f"s3://bucket/a.img#region=us-east-1&endpoint={endpoint}"
            async with device_on(name) as device:
                assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
                await obstore.put_async(bucket, "a.img", IMAGE[::-1])
                with pytest.raises(DeviceError):
                    await device.read(2 * MIB, 512)
                assert device.changed
            assert "no such object" in await refused(name.replace("a.img", "b.img"))


async def _make_bucket(port: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"PUT /bucket HTTP/1.1\r\nHost: s3\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    )
    assert b" 200 " in await reader.readline()
    writer.close()


def rclone() -> str:
    found = shutil.which(
        "rclone", path=str(Path(sys.executable).parent)
    ) or shutil.which("rclone")
    if found is None:
        pytest.skip("rclone is missing")
    return found


@pytest.mark.parametrize("kind", ["s3", "http"])
async def test_rclone(tmp_path: Path, kind: str) -> None:
    """Its web server works; its S3 answers ranges with the whole object, and is refused by name."""
    (tmp_path / "bucket").mkdir()
    (tmp_path / "bucket" / "a.img").write_bytes(IMAGE)
    port = free_port()
    argv = [rclone(), "serve", kind, str(tmp_path), "--addr", f"127.0.0.1:{port}"]
    argv += ["--config", str(tmp_path / "none.conf")]
    with process(argv, port):
        if kind == "s3":
            name = (
                f"s3://bucket/a.img#region=us-east-1&endpoint=http://127.0.0.1:{port}"
            )
            assert "the store does not support ranges" in await refused(name)
        else:
            async with device_on(f"http://127.0.0.1:{port}/bucket/a.img") as device:
                assert bytes(await device.read(0, len(IMAGE))) == IMAGE
