# SPDX-License-Identifier: Apache-2.0
"""ObjectStore, also against moto and a store that knows no ranges (rclone serve s3). What all kinds of remote images do:
../ranged/test_misbehaving_servers.py."""

import asyncio
import hmac
import json
import shutil
import ssl
import subprocess
import sys
import time
import urllib.request
from base64 import b64decode, b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from pathlib import Path

import pytest
import trustme

from tests.support.patience import PATIENCE_S, wait_until

pytest.importorskip("obstore", reason="the package obstore is missing")

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.http.url_command import set_url_commands
from nbdtarget.devices.objects import store as module
from tests.support.image_server import Answer, ImageServer, Request
from tests.support.processes import maybe_port
from tests.support.remote_images import (
    IMAGE,
    MIB,
    change,
    device_on,
    hasten,
    name_on,
    one_attempt,
    refused,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


async def test_object_is_read_by_ranges_that_name_the_pinned_one() -> None:
    async with ImageServer(IMAGE) as server, device_on(name_on(server, "s3")) as device:
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


async def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "is_obstore_installed", lambda: False)
    text = await refused("s3://bucket/a.img")
    assert text == (
        "s3://bucket/a.img: needs the package obstore: pip install 'nbdtarget[objects]'"
    )


@pytest.mark.parametrize("life_s", [2, 3600])
async def test_credentials_of_a_command_are_renewed_when_they_end(
    tmp_path: Path, life_s: int
) -> None:
    """The store may refuse credentials before they expire. If they live two seconds, the library may renew them before that."""
    count = tmp_path / "count"
    count.write_text("")
    script = tmp_path / "credentials.py"
    script.write_text(
        "import datetime, json\n"
        f"with open({str(count)!r}, 'a') as file: file.write('x')\n"
        f"nr = len(open({str(count)!r}).read())\n"
        f"end = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds={life_s})\n"
        "print(json.dumps({'AccessKeyId': f'id{nr}', 'SecretAccessKey': 'topsecret',"
        " 'SessionToken': f'token{nr}', 'Expiration': end.isoformat()}))\n"
    )
    set_url_commands({"s3://bucket/dir/a%20b.img": [sys.executable, str(script)]})
    try:
        async with ImageServer(IMAGE) as server:
            nr_ended = 0

            def behave(request: Request, answer: Answer) -> None:
                token = request.headers["x-amz-security-token"]
                if int(token.removeprefix("token")) <= nr_ended:
                    change(403, b"<Error><Code>ExpiredToken</Code></Error>")(answer)

            server.behave = behave
            async with device_on(name_on(server, "s3")) as device:
                await device.read(MIB, 512)
                nr_ended = len(count.read_text())
                assert (
                    bytes(await device.read(2 * MIB, 512))
                    == IMAGE[2 * MIB : 2 * MIB + 512]
                )
                assert len(count.read_text()) > nr_ended
                assert device.traffic.renewals <= 1
                assert life_s == 2 or device.traffic.renewals == 1
                assert device.health.last_error == ""
    finally:
        set_url_commands({})


async def test_tls_with_an_authority_of_ones_own(tmp_path: Path) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    async with ImageServer(IMAGE, context) as server:
        async with device_on(name_on(server, "s3", f"&ca={ca}")) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
        assert "cannot be read" in await refused(name_on(server, "s3", "&ca=/missing"))


@contextmanager
def process(argv: list[str]) -> Iterator[int]:
    """Run a server that takes any free port. Yields the port."""
    child = subprocess.Popen(argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        wait_until(lambda: bool(maybe_port(child.pid)) or child.poll() is not None)
        port = maybe_port(child.pid)
        assert port is not None, "it ended"
        yield port
    finally:
        child.kill()
        child.wait()


async def test_moto_is_read_and_a_new_upload_is_noticed() -> None:
    pytest.importorskip("moto", reason="the package moto is missing")
    import obstore
    from obstore.store import S3Store

    argv = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", "0"]
    with process(argv) as port:
        endpoint = f"http://127.0.0.1:{port}"
        bucket = S3Store(
            "bucket",
            config={"endpoint": endpoint, "region": "us-east-1", "virtual_hosted_style_request": False},
            client_options={"allow_http": True},
        )  # fmt: skip
        async with asyncio.timeout(PATIENCE_S):
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


async def test_azurite_is_read_and_a_new_upload_is_noticed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Microsoft's own emulator, with a signature by the account's key."""
    program = shutil.which("azurite-blob")
    if program is None:
        pytest.skip("azurite is missing (npm install -g azurite)")
    import obstore
    from obstore.store import AzureStore

    # The emulator's own account, which everybody knows.
    account = "devstoreaccount1"
    key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", key)
    argv = [program, "--silent", "--inMemoryPersistence", "--skipApiVersionCheck"]
    argv += ["--blobHost", "127.0.0.1", "--blobPort", "0"]
    with process(argv) as port:
        endpoint = f"http://127.0.0.1:{port}/{account}"
        _make_container(endpoint, account, key)
        container = AzureStore(
            "container",
            config={"endpoint": endpoint, "account_name": account, "account_key": key},
            client_options={"allow_http": True},
        )
        name = f"az://container/a.img#account={account}&endpoint={endpoint}"
        async with asyncio.timeout(PATIENCE_S):
            await obstore.put_async(container, "a.img", IMAGE)
            async with device_on(name) as device:
                assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
                await obstore.put_async(container, "a.img", IMAGE[::-1])
                with pytest.raises(DeviceError):
                    await device.read(2 * MIB, 512)
                assert device.changed
            assert "no such object" in await refused(name.replace("a.img", "b.img"))
            monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_KEY", "d3Jvbmc=")
            assert "access is denied" in await refused(name)


def _make_container(endpoint: str, account: str, key: str) -> None:
    date = formatdate(usegmt=True)
    version = "2021-08-06"
    signed = "PUT" + "\n" * 12 + f"x-ms-date:{date}\nx-ms-version:{version}\n"
    signed += f"/{account}/{account}/container\nrestype:container"
    digest = hmac.digest(b64decode(key), signed.encode(), "sha256")
    headers = {
        "x-ms-date": date,
        "x-ms-version": version,
        "Authorization": f"SharedKey {account}:{b64encode(digest).decode()}",
    }
    url = f"{endpoint}/container?restype=container"
    request = urllib.request.Request(url, method="PUT", headers=headers)
    assert urllib.request.urlopen(request).status == 201


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
    argv = [rclone(), "serve", kind, str(tmp_path), "--addr", "127.0.0.1:0"]
    argv += ["--config", str(tmp_path / "none.conf")]
    with process(argv) as port:
        if kind == "s3":
            name = (
                f"s3://bucket/a.img#region=us-east-1&endpoint=http://127.0.0.1:{port}"
            )
            assert "the store does not support ranges" in await refused(name)
        else:
            async with device_on(f"http://127.0.0.1:{port}/bucket/a.img") as device:
                assert bytes(await device.read(0, len(IMAGE))) == IMAGE


# ---- what the three kinds of stores have of their own; the whole table: ../ranged/test_misbehaving_servers.py ----

OBJECT_KINDS = ("s3", "gs", "az")
VERSIONS = {
    "s3": "x-amz-version-id",
    "gs": "x-goog-generation",
    "az": "x-ms-version-id",
}


@pytest.mark.parametrize("kind", OBJECT_KINDS)
async def test_version_is_pinned(kind: str) -> None:
    """The version is compared even if the ETag stays the same: a generation of Google's, for example, is new with each upload."""
    async with ImageServer(IMAGE) as server:
        version = "1700000000000001"
        server.behave = lambda _, answer: answer.headers.update(
            {VERSIONS[kind]: version}
        )
        async with device_on(name_on(server, kind)) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            found = await device.identify("source")
            assert f"version={version}" in found.ids
            assert found.is_pinned
            version = "1700000000000002"
            with pytest.raises(DeviceError):
                await device.read(2 * MIB, 512)
            assert device.changed == (
                "it was replaced: its version is 1700000000000002, not 1700000000000001"
            )


class Tokens:
    """The service that gives a machine in the cloud its tokens, as part of the server of a store."""

    def __init__(
        self, server: ImageServer, kind: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.server = server
        self.life_s = 2
        self.nr_given = 0
        self.is_revoked = False  # the newest, before its time
        host = f"127.0.0.1:{server.port}"
        monkeypatch.setenv("GCE_METADATA_HOST", host)
        monkeypatch.setenv("AZURE_MSI_ENDPOINT", f"http://{host}/msi")
        server.pages = {"/computeMetadata/" if kind == "gs" else "/msi": self._give}
        server.behave = self._check
        self.name = name_on(server, kind).replace("anonymous=yes&", "")

    def _give(self, _: Request) -> bytes:
        self.nr_given += 1
        self.is_revoked = False
        until_s = int(time.time()) + self.life_s
        answer = {
            "access_token": f"topsecret{self.nr_given}",
            "expires_in": self.life_s,
            "expires_on": str(until_s),
        }
        return json.dumps(answer).encode()

    def _check(self, request: Request, answer: Answer) -> None:
        token = request.headers.get("authorization")
        if self.is_revoked or token != f"Bearer topsecret{self.nr_given}":
            change(401, b"")(answer)


@pytest.mark.parametrize("life_s", [2, 3600])
@pytest.mark.parametrize("kind", ["gs", "az"])
async def test_token_that_has_ended_is_renewed(
    kind: str, life_s: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The store may refuse a token before it expires. If it lives two seconds, the library may renew it before that."""
    async with ImageServer(IMAGE) as server:
        tokens = Tokens(server, kind, monkeypatch)
        tokens.life_s = life_s
        async with device_on(tokens.name) as device:
            await device.read(MIB, 512)
            nr_before = tokens.nr_given
            tokens.is_revoked = True
            assert bytes(await device.read(2 * MIB, 512)) == IMAGE[2 * MIB :][:512]
            assert tokens.nr_given > nr_before
            assert device.traffic.renewals <= 1
            assert device.health.last_error == ""


@pytest.mark.parametrize("kind", OBJECT_KINDS)
async def test_signature_stays_on_its_host(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ImageServer(IMAGE) as other, ImageServer(IMAGE) as server:
        name = name_on(server, kind)
        if kind != "s3":
            name = Tokens(server, kind, monkeypatch).name
        server.behave = lambda _, answer: change(302, b"", Location=other.url("/x"))(
            answer
        )
        async with device_on(name):
            pass
        assert "authorization" in server.noted[0].headers
        assert other.noted
        assert not any("authorization" in each.headers for each in other.noted)


@pytest.mark.parametrize("kind", OBJECT_KINDS)
async def test_https_is_not_left_for_http(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_attempt(monkeypatch)
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    ca = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(ca))
    async with ImageServer(IMAGE) as plain, ImageServer(IMAGE, context) as server:
        server.behave = lambda _, answer: change(302, b"", Location=plain.url())(answer)
        text = await refused(name_on(server, kind, f"&ca={ca}"))
        assert "redirects too often, or from https to http" in text
        assert server.noted
        assert plain.noted == []
