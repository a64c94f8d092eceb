# SPDX-License-Identifier: Apache-2.0
"""HttpStore over real sockets: each rule of the module head. What all kinds of remote images do: ../ranged/test_misbehaving_servers.py."""

import asyncio
import gzip
import logging
import socket
import ssl
from collections.abc import Callable
from pathlib import Path

import pytest
import trustme

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.http import store as module
from nbdtarget.devices.http.url_command import set_url_commands
from nbdtarget.devices.ranged.store import SourceAway
from tests.support.image_server import Answer, ImageServer, Request
from tests.support.patience import until
from tests.support.remote_images import (
    IMAGE,
    KIB,
    MIB,
    change,
    device_on,
    hang_up,
    hasten,
    once,
    one_attempt,
    refused,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


# ---- what is asked for ----


async def test_image_is_read_by_ranges_and_never_asked_for_by_head() -> None:
    async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
        assert device.size == len(IMAGE)
        assert bytes(await device.read(MIB + 5, 4096)) == IMAGE[MIB + 5 : MIB + 4101]
        assert bytes(await device.read(0, len(IMAGE))) == IMAGE
        assert {request.method for request in server.noted} == {"GET"}
        first, *rest = server.noted
        assert (first.begin, first.end) == (0, module.HEAD_BYTES)
        assert "if-match" not in first.headers
        assert {request.headers["if-match"] for request in rest} == {'"one"'}
        assert {request.headers["accept-encoding"] for request in server.noted} == {
            "identity"
        }
        assert not any("authorization" in request.headers for request in server.noted)


async def test_first_read_is_one_request_on_the_connection_of_the_opening() -> None:
    """The first read takes one round trip. A new connection would take another one, and with TLS two."""
    async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
        assert bytes(await device.read(2 * MIB, 4096)) == IMAGE[2 * MIB :][:4096]
        assert (len(server.noted), server.nr_connections) == (2, 1)
        assert server.noted[1].end - server.noted[1].begin == 256 * KIB


async def test_weak_validators_are_compared_and_the_time_is_sent(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with ImageServer(IMAGE) as server:
        server.etag = 'W/"x"'
        async with device_on(server.url()) as device:
            await device.read(MIB, 512)
            last = server.noted[-1].headers
            assert "if-match" not in last
            assert last["if-unmodified-since"] == server.last_modified
    assert "only size and time of last modification" in caplog.text


async def test_url_goes_out_as_it_was_written() -> None:
    target = "/a%2Fb/%7Ec/d~e.img?X-Sig=%2F%3D+%20&y=a%2bb"
    async with ImageServer(IMAGE) as server, device_on(server.url(target)) as device:
        await device.read(MIB, 512)
        assert {request.target for request in server.noted} == {target}
        assert "X-Sig" not in device.name


@pytest.mark.parametrize("etag", ['"\xe9\xff"', '"a\x01b"', ""], ids=range(3))
async def test_validators_that_cannot_be_sent_are_compared(etag: str) -> None:
    """Servers may put any byte but an end of line into an ETag."""
    async with ImageServer(IMAGE) as server:
        server.etag, server.last_modified = etag, "\xfc"
        async with device_on(server.url()) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            found = await device.identify("source")
            assert all(each.isascii() and each.isprintable() for each in found.ids)
            server.etag, server.last_modified = etag, "\xfd"
            if etag:
                server.etag = '"\xe9\xfe"'
            with pytest.raises(DeviceError):
                await device.read(2 * MIB, 512)
            assert "it was replaced" in device.changed
            assert device.changed.isprintable()


@pytest.mark.parametrize("scheme", ["", "http://"], ids=["host and port", "URL"])
async def test_proxy_of_the_environment(
    monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    async with ImageServer(IMAGE) as server:
        monkeypatch.setenv("http_proxy", f"{scheme}127.0.0.1:{server.port}")
        async with device_on("http://far.example/disk.img") as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
        assert server.noted[0].target == "http://far.example/disk.img"


@pytest.mark.parametrize(
    "proxy", ["socks5://me:secret@h:1", "http://", "http://me:secret@h:port"]
)
async def test_proxy_that_is_none_is_named_and_not_shown(
    monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("http_proxy", proxy)
    text = await refused("http://far.example/disk.img")
    assert "the environment variable http_proxy names no HTTP proxy" in text
    assert "secret" not in text


async def test_address_of_ipv6() -> None:
    server = ImageServer(IMAGE, host="::1")
    try:
        await server.__aenter__()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    try:
        async with device_on(server.url(host="[::1]")) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            assert server.noted[0].headers["host"] == f"[::1]:{server.port}"
    finally:
        await server.stop()


async def test_image_of_five_tebibytes() -> None:
    size = 5 << 40

    def behave(request: Request, answer: Answer) -> None:
        end = min(request.end, size)
        body = (request.begin >> 20).to_bytes(8) * ((end - request.begin) // 8)
        change(206, body, Content_Range=f"bytes {request.begin}-{end - 1}/{size}")(
            answer
        )

    async with ImageServer(IMAGE) as server:
        server.behave = behave
        async with device_on(server.url()) as device:
            assert device.size == size
            at = size - 4096
            assert bytes(await device.read(at, 4096)) == (at >> 20).to_bytes(8) * 512


async def test_two_kinds_of_reads_use_connections_of_their_own() -> None:
    async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
        await device.read(MIB, 512)
        assert server.nr_connections == 1  # it was kept open


# ---- what is refused when an image is opened ----


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        (change(200, IMAGE, Content_Range=""), "the server does not support ranges"),
        (change(Content_Range=""), "does not say which range it sends"),
        (change(Content_Range="bytes 0-1/3145728"), "the server sent bytes 0 to 1 when asked for 0 to 262143"),
        (change(Content_Encoding="gzip"), "the server sends it encoded (gzip)"),
        (change(404, b""), "the server has no such file (status 404)"),
        (change(403, b""), "access is denied (status 403)"),
        (change(401, b""), "access is denied (status 401)"),
        (change(405, b""), "the server answers with status 405"),
        (change(416, b"", Content_Range="bytes */0"), "is empty"),
        (change(ETag="", Last_Modified=""), "tells neither an ETag nor a time of last modification"),
        (change(302, b""), "redirects and does not say where to"),
        (change(302, b"", Location="ftp://h/a"), "redirects to ftp:, which is not followed"),
        (change(302, b"", Location="http://h:bad/a"), "redirects to what is no URL"),
        (change(302, b"", Location="https:///a"), "redirects to a URL without a host"),
    ],
    ids=range(14),
)  # fmt: skip
async def test_refused_at_open(changed: Callable[[Answer], None], says: str) -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(changed, 0)
        text = await refused(server.url("/a?sig=secret", user="me:pw@"))
        assert says in text
        assert text.startswith(f"http://***@127.0.0.1:{server.port}/a?***: ")
        assert len(server.noted) == 1  # none of these is tried again


async def test_endless_redirects_are_refused() -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = lambda _, answer: change(302, b"", Location="/next")(answer)
        assert "redirects more than 5 times" in await refused(server.url())
        assert len(server.noted) == 6


async def test_no_server_and_no_such_name(monkeypatch: pytest.MonkeyPatch) -> None:
    one_attempt(monkeypatch)
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
        text = await refused(f"http://127.0.0.1:{port}/a")
        assert f"cannot connect to 127.0.0.1 port {port}: " in text


# ---- a server that fails for a while; the whole table: ../ranged/test_misbehaving_servers.py ----


@pytest.mark.parametrize(
    "changed",
    [change(body=IMAGE[: 100 * KIB]), change(body=IMAGE)],
    ids=["short", "long"],
)
async def test_no_byte_of_an_answer_of_the_wrong_length_is_used(
    changed: Callable[[Answer], None],
) -> None:
    """The length of an answer is checked first: these bodies belong to another place of the image."""
    async with ImageServer(IMAGE) as server:
        server.behave = once(changed)
        async with device_on(server.url()) as device:
            assert bytes(await device.read(MIB, MIB)) == IMAGE[MIB : 2 * MIB]
            assert device.traffic.retries == 1


async def test_body_that_breaks_off_is_continued_where_it_broke() -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(hang_up(100 * KIB))
        async with device_on(server.url()) as device:
            assert bytes(await device.read(MIB, MIB)) == IMAGE[MIB : 2 * MIB]
            again = [
                request.begin for request in server.noted if request.begin % (256 * KIB)
            ]
            assert again == [MIB + 100 * KIB]


# ---- redirects and secrets ----


def redirect_to(
    target: str, path: str = "/disk.img"
) -> Callable[[Request, Answer], None]:
    def behave(request: Request, answer: Answer) -> None:
        if request.target.startswith(path):
            change(302, b"", Location=target)(answer)

    return behave


async def test_redirect_is_followed_to_the_letter_and_remembered() -> None:
    target = "/real%2Fplace?Signature=a%2Fb%3D%7E~&Expires=5"
    async with ImageServer(IMAGE) as server:
        server.behave = redirect_to(target)
        async with device_on(server.url()) as device:
            await device.read(MIB, 512)
            await device.read(2 * MIB, 512)
            targets = [request.target for request in server.noted]
            assert targets == ["/disk.img", target, target, target]


async def test_secret_goes_to_its_own_origin_only() -> None:
    async with ImageServer(IMAGE) as other, ImageServer(IMAGE) as server:
        server.behave = redirect_to(other.url("/real", user="you:evil@"), "/disk.img")
        async with device_on(server.url(user="me:pw@")) as device:
            await device.read(MIB, 512)
            assert server.noted[0].headers["authorization"] == "Basic bWU6cHc="
            assert other.noted
            assert not any(
                "authorization" in request.headers for request in other.noted
            )
        server.behave = redirect_to("/same", "/disk.img")
        async with device_on(server.url(user="me:pw@")) as device:
            assert server.noted[-1].target == "/same"
            assert server.noted[-1].headers["authorization"] == "Basic bWU6cHc="


@pytest.mark.parametrize("status", [401, 403, 404, 410])
async def test_redirect_that_has_expired_is_asked_for_anew(status: int) -> None:
    async with ImageServer(IMAGE) as server:
        given = 0

        def behave(request: Request, answer: Answer) -> None:
            nonlocal given
            if request.target == "/disk.img":
                given += 1
                change(302, b"", Location=f"/signed?nr={given}")(answer)
            elif request.target == "/signed?nr=1" and len(server.noted) > 2:
                change(status, b"")(answer)

        server.behave = behave
        async with device_on(server.url()) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            targets = [request.target for request in server.noted]
            assert targets == [
                "/disk.img", "/signed?nr=1", "/signed?nr=1", "/disk.img", "/signed?nr=2",
            ]  # fmt: skip
            assert device.traffic.retries == 0


async def test_url_command_gives_a_new_url(tmp_path: Path) -> None:
    count = tmp_path / "count"
    count.write_text("")
    async with ImageServer(IMAGE) as server:
        script = f'printf x >> {count}; echo "{server.url()}?sig=$(wc -c < {count})"'
        set_url_commands({server.url(): ["/bin/sh", "-c", script]})
        try:

            def behave(request: Request, answer: Answer) -> None:
                if (
                    request.target
                    != f"/disk.img?sig={2 if len(server.noted) > 1 else 1}"
                ):
                    change(403, b"")(answer)

            server.behave = behave
            async with device_on(server.url()) as device:
                assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
                targets = [request.target for request in server.noted]
                assert targets == [
                    "/disk.img?sig=1",
                    "/disk.img?sig=1",
                    "/disk.img?sig=2",
                ]
                assert device.traffic.renewals == 1
        finally:
            set_url_commands({})


async def test_logs_and_errors_hold_no_secret(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    async with ImageServer(IMAGE) as server:
        url = server.url("/disk.img?sig=topsecret", user="me:hidden@")
        async with device_on(url) as device:
            server.behave = lambda _, answer: change(403, b"")(answer)
            reading = asyncio.create_task(device.read(MIB, 512))
            await until(lambda: bool(device.health.last_error))
            server.behave = lambda _, answer: change(
                302, b"", Location="http://x:y/?topsecret"
            )(answer)
            nr = len(server.noted)
            await until(lambda: len(server.noted) >= nr + 3)
            server.behave = once(change(ETag='"two"'), 0)
            with pytest.raises(DeviceError):
                await reading
            text = (
                caplog.text
                + str(await device.identify("source"))
                + device.health.last_error
            )
    assert "another" in text or "replaced" in text
    assert "topsecret" not in text
    assert "hidden" not in text


# ---- TLS and proxies ----


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


def contexts(authority: trustme.CA, path: Path) -> tuple[ssl.SSLContext, Path]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1", "localhost").configure_cert(context)
    authority.cert_pem.write_to_path(str(path / "ca.pem"))
    return context, path / "ca.pem"


async def test_https_with_an_authority_of_ones_own(
    authority: trustme.CA, tmp_path: Path
) -> None:
    context, ca = contexts(authority, tmp_path)
    async with (
        ImageServer(IMAGE, context) as server,
        device_on(f"{server.url()}#ca={ca}") as device,
    ):
        assert bytes(await device.read(MIB, MIB)) == IMAGE[MIB : 2 * MIB]


async def test_certificate_that_is_not_accepted(
    authority: trustme.CA, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one_attempt(monkeypatch)
    context, _ = contexts(authority, tmp_path)
    async with ImageServer(IMAGE, context) as server:
        text = await refused(server.url())
        assert "the server's certificate is not accepted: " in text
        assert server.noted == []
        text = await refused(f"{server.url()}#ca={tmp_path}/missing.pem")
        assert "missing.pem cannot be read: No such file" in text


async def test_https_is_not_left_for_http(
    authority: trustme.CA, tmp_path: Path
) -> None:
    context, ca = contexts(authority, tmp_path)
    async with ImageServer(IMAGE) as plain, ImageServer(IMAGE, context) as server:
        server.behave = redirect_to(plain.url())
        text = await refused(f"{server.url()}#ca={ca}")
        assert "redirects from https to http, which is not followed" in text
        assert plain.noted == []


async def test_proxy_of_the_environment_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with ImageServer(IMAGE) as proxy:
        monkeypatch.setenv("http_proxy", proxy.url("").rstrip("/"))
        async with device_on("http://image.example/disk.img") as device:
            await device.read(MIB, 512)
            assert proxy.noted[0].target == "http://image.example/disk.img"
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
            assert server.noted[0].target == "/disk.img"


async def test_environment_is_looked_through_once_for_each_origin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Reading the environment takes a millisecond, and a fresh clone sends eight requests while its first client waits."""
    looked: list[None] = []

    def proxies() -> dict[str, str]:
        looked.append(None)
        return {}

    monkeypatch.setattr(module, "getproxies", proxies)
    async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
        for nr in range(3):
            await device.read(nr * MIB, 512)
        assert len(server.noted) > 2
        assert len(looked) == 1


async def test_origins_whose_proxies_are_known_have_a_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "PROXIES_MAX", 1)
    async with ImageServer(IMAGE) as server, ImageServer(IMAGE) as moved:
        server.behave = redirect_to(moved.url())
        async with device_on(server.url()) as device:
            assert bytes(await device.read(MIB, 512)) == IMAGE[MIB : MIB + 512]
            assert isinstance(device.store, module.HttpStore)
            assert len(device.store._proxies) == 1


async def test_body_in_gzip_that_is_not_announced_is_not_decoded() -> None:
    """The bytes of the file are served as they are, also if they look packed."""
    packed = gzip.compress(IMAGE)
    async with ImageServer(packed) as server, device_on(server.url()) as device:
        assert bytes(await device.read(0, 4096)) == packed[:4096]


async def test_closed_store_opens_no_connection_any_more() -> None:
    async with ImageServer(IMAGE) as server, device_on(server.url()) as device:
        assert await device.read(0, 4096) == IMAGE[:4096]
        store = device._fetcher.store
        await store.close()
        nr_before = len(server.noted)
        with pytest.raises(SourceAway, match="closed"):
            await store.get(
                0, 4096, device._fetcher.pin, lambda _: None, is_urgent=True
            )
        assert len(server.noted) == nr_before
