# SPDX-License-Identifier: Apache-2.0
"""One table of misbehaving servers for every kind of remote image: web server, S3, Google Cloud Storage, Azure.

Each row is a way in which a server misbehaves once, or all the time, and what must come of it:

    RETRIED    the answer is not used, not a byte of it, and the same range is asked for again
    REPLACED   the image is another one: nothing is read any more, and the reason is told
    REFUSED    the image is not opened, in one line that says why, without trying again
"""

import asyncio
import re

import pytest

from nbdtarget.common.errors import DeviceError
from nbdtarget.devices.health import HealthState
from tests.support.image_server import Answer, ImageServer, Request
from tests.support.patience import until
from tests.support.remote_images import (
    IMAGE,
    KIB,
    KINDS,
    MIB,
    Misbehaviour,
    change,
    device_on,
    hang_up,
    hasten,
    name_on,
    once,
    one_attempt,
    raw,
    refused,
)

pytest.importorskip("obstore", reason="the package obstore is missing")

OTHER = IMAGE[::-1]
CELL = "bytes 1048576-1310719"  # what the second request of these tests asks for


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    hasten(monkeypatch)


RETRIED: dict[str, Misbehaviour] = {
    **{
        f"status {status}": change(status, b"")
        for status in (404, 408, 425, 429, 500, 502, 503, 504, 507)
    },
    "expired, says 403": change(403, b"<Error><Code>ExpiredToken</Code></Error>"),
    "expired, says 400": change(400, b"<Error><Code>ExpiredToken</Code></Error>"),
    "200 and the whole file": change(200, IMAGE, Content_Range=""),
    "200 and the right part": change(200, Content_Range=""),
    "206 of another range": change(Content_Range="bytes 0-262143/3145728"),
    "206 of a shorter range": change(Content_Range="bytes 1048576-1050623/3145728"),
    "206 that does not tell the size": change(Content_Range=f"{CELL}/*"),
    "206 without a range": change(Content_Range=""),
    "206 of several parts": change(
        body=b"--x\r\nContent-Range: bytes 1048576-1048577/3145728\r\n\r\nab\r\n--x--",
        Content_Range="",
        Content_Type="multipart/byteranges; boundary=x",
    ),
    "range in another unit": change(Content_Range="lines 1048576-1310719/3145728"),
    "encoded by gzip": change(Content_Encoding="gzip"),
    "encoded by br": change(Content_Encoding="br"),
    "no ETag any more": change(ETag=""),
    "only a weak ETag": change(ETag='W/"one"'),
    "hangs up before the body": hang_up(0),
    "hangs up in the body": hang_up(100 * KIB),
    "short, and says so": change(body=IMAGE[MIB : MIB + 100 * KIB]),
    "long, and says so": change(body=IMAGE[MIB:]),
    "no HTTP": raw(b"SSH-2.0-OpenSSH_9.2\r\n"),
    "headers that are too large": raw(b"HTTP/1.1 206 So\r\nX: " + b"x" * (1 << 20)),
    "headers without end": raw(b"HTTP/1.1 206 So\r\n" + b"X: y\r\n" * 100_000),
    "length that is no number": raw(
        b"HTTP/1.1 206 So\r\nContent-Length: -5\r\nETag: \"one\"\r\n\r\n"
    ),
    "not modified": change(304, b""),
}  # fmt: skip


# The three object stores are read by one library, so these rows do for the other two.
FEW = ("status 503", "expired, says 403", "200 and the whole file", "206 of another range", "no ETag any more", "hangs up in the body")  # fmt: skip
ROWS = [
    (kind, row) for kind in KINDS for row in RETRIED if kind in ("http", "s3") or row in FEW
]  # fmt: skip


@pytest.mark.parametrize(("kind", "row"), ROWS)
async def test_retried(kind: str, row: str) -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(RETRIED[row])
        async with device_on(name_on(server, kind)) as device:
            assert bytes(await device.read(MIB, MIB)) == IMAGE[MIB : 2 * MIB]
            assert device.traffic.retries == 1
            assert device.health.state is HealthState.OK
            # After an answer breaks off, the rest is requested by our code with the pin, and not by the library without one.
            assert {r.headers.get("if-match") for r in server.noted[1:]} == {'"one"'}


REPLACED: dict[str, Misbehaviour] = {
    "412": change(412, b""),
    "another ETag": change(ETag='"two"'),
    "another size": change(Content_Range=f"{CELL}/3145729"),
    "416, and another size": change(416, b"", Content_Range="bytes */1000"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", REPLACED)
async def test_replaced(kind: str, row: str) -> None:
    async with ImageServer(IMAGE) as server:
        server.behave = once(REPLACED[row])
        async with device_on(name_on(server, kind)) as device:
            with pytest.raises(DeviceError):
                await device.read(MIB, 4096)
            assert re.search(r"it was replaced|its size is 1000", device.changed)
            assert device.health.state is HealthState.LOST
            nr_before = len(server.noted)
            with pytest.raises(DeviceError):
                await device.read(2 * MIB, 512)
            assert len(server.noted) == nr_before  # and it is not asked again


REFUSED: dict[str, tuple[Misbehaviour, str]] = {
    "200 and the whole file": (change(200, IMAGE, Content_Range=""), "does not support ranges"),
    "no such file": (change(404, b""), r"has no such (file|object) \(status 404\)"),
    "403": (change(403, b""), r"access is denied \(status 403\)"),
    "401": (change(401, b""), r"access is denied \(status 401\)"),
    "a range in another unit": (change(Content_Range="lines 0-9/3145728"), "does not say which range it sends"),
    "no range": (change(Content_Range=""), "does not say which range it sends"),
    "size is not told": (change(Content_Range="bytes 0-262143/*"), "does not say which range it sends"),
    "neither ETag nor time": (change(ETag="", Last_Modified=""), "tells neither an ETag|does not tell when"),
    "redirects without end": (change(302, b"", Location="/next"), "redirects (more than 5 times|too often)"),
    "empty": (change(416, b"", Content_Range="bytes */0"), "is empty"),
    "encoded": (change(Content_Encoding="gzip"), r"encoded \(gzip\), not as it is"),
    "another range": (change(Content_Range="bytes 5-262148/3145728"), "sent (bytes 5 to 262148|another range)"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("row", REFUSED)
async def test_refused(kind: str, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    one_attempt(monkeypatch)
    changed, says = REFUSED[row]
    async with ImageServer(IMAGE) as server:
        server.behave = lambda _, answer: changed(answer)
        text = await refused(name_on(server, kind))
        assert re.search(says, text)
        assert text.startswith(f"{kind}://")
        if "redirects" not in says:
            # Credentials are looked for anew, once.
            is_denied = "denied" in says and kind != "http"
            assert len(server.noted) == (2 if is_denied else 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("honours_if_match", [True, False])
async def test_no_byte_of_another_image_is_ever_read(
    kind: str, honours_if_match: bool
) -> None:
    """The image is replaced while it is copied; each read that succeeds is of the first one."""
    async with ImageServer(IMAGE) as server:
        answered = iter(range(1000))

        def behave(request: Request, answer: Answer) -> None:
            if next(answered) == 2:
                server.image, server.etag = OTHER, '"two"'
            if not honours_if_match and answer.status == 412:
                body = server.image[request.begin : request.end]
                answer.status, answer.body = 206, body
                end = request.begin + len(body) - 1
                answer.headers["Content-Range"] = (
                    f"bytes {request.begin}-{end}/{len(IMAGE)}"
                )

        server.behave = behave
        async with device_on(name_on(server, kind)) as device:
            reads = [device.read(at, 64 * KIB) for at in range(0, len(IMAGE), 64 * KIB)]
            results = await asyncio.gather(*reads, return_exceptions=True)
            nr_good = 0
            for nr, result in enumerate(results):
                if isinstance(result, memoryview):
                    assert bytes(result) == IMAGE[nr * 64 * KIB :][: 64 * KIB]
                    nr_good += 1
            assert 0 < nr_good < len(results)
            assert device.changed.startswith("it was replaced")


@pytest.mark.parametrize("kind", KINDS)
async def test_storm_of_503_ends_some_time(kind: str) -> None:
    """Forty refusals in a row: nothing fails, half as many are asked at a time, and it goes on afterwards."""
    left = 40

    def behave(_: Request, answer: Answer) -> None:
        nonlocal left
        if left:
            left -= 1
            change(503, b"", Retry_After="0")(answer)

    async with (
        ImageServer(IMAGE) as server,
        device_on(name_on(server, kind)) as device,
    ):
        server.behave = behave
        reads = [device.read(at, 4096) for at in range(0, len(IMAGE), 256 * KIB)]
        for nr, data in enumerate(await asyncio.gather(*reads)):
            assert bytes(data) == IMAGE[nr * 256 * KIB :][:4096]
        assert left == 0
        assert device.traffic.failures["away"] == 40
        await until(lambda: not device.health.last_error)


@pytest.mark.parametrize("kind", KINDS)
async def test_server_that_goes_and_comes_back_is_waited_for(kind: str) -> None:
    server = ImageServer(IMAGE)
    async with server, device_on(name_on(server, kind)) as device:
        port = server.port
        await server.stop()
        reading = asyncio.create_task(device.read(MIB, 4096))
        await until(lambda: bool(device.health.last_error))
        server._server = await asyncio.start_server(server._serve, "127.0.0.1", port)
        assert bytes(await reading) == IMAGE[MIB : MIB + 4096]
        # The read has its bytes before the whole answer is there.
        await until(lambda: not device.health.last_error)


@pytest.mark.parametrize("kind", KINDS)
async def test_pin_is_recorded_and_compared_at_the_next_opening(kind: str) -> None:
    async with ImageServer(IMAGE) as server:
        async with device_on(name_on(server, kind)) as device:
            first = await device.identify("source")
        assert 'etag="one"' in first.ids
        assert not any("endpoint" in each for each in first.ids)
        async with device_on(name_on(server, kind)) as device:
            assert await device.identify("source") == first
        server.etag = '"two"'
        async with device_on(name_on(server, kind)) as device:
            assert await device.identify("source") != first


@pytest.mark.parametrize("kind", KINDS)
async def test_chunked_answer_is_as_good(kind: str) -> None:
    """A web server need not tell the length of its body: the range does. obstore wants to be told: the next answer is taken."""

    def chunked(answer: Answer) -> None:
        head = "".join(f"{k}: {v}\r\n" for k, v in answer.headers.items())
        parts = [answer.body[at : at + 7000] for at in range(0, len(answer.body), 7000)]
        body = b"".join(b"%x\r\n%s\r\n" % (len(each), each) for each in parts)
        answer.text = (
            f"HTTP/1.1 206 So\r\nTransfer-Encoding: chunked\r\n{head}\r\n".encode()
            + body
            + b"0\r\n\r\n"
        )

    async with ImageServer(IMAGE) as server:
        server.behave = once(chunked)
        async with device_on(name_on(server, kind)) as device:
            assert bytes(await device.read(MIB, 256 * KIB)) == IMAGE[MIB:][: 256 * KIB]
            assert device.traffic.retries == (0 if kind == "http" else 1)


@pytest.mark.parametrize("kind", KINDS)
async def test_connections_that_are_closed_after_each_answer(kind: str) -> None:
    def behave(_: Request, answer: Answer) -> None:
        answer.hangs_up = True  # and it has not said so

    async with ImageServer(IMAGE) as server:
        server.behave = behave
        async with device_on(name_on(server, kind)) as device:
            for at in range(0, len(IMAGE), 512 * KIB):
                assert bytes(await device.read(at, 512)) == IMAGE[at : at + 512]
            assert server.nr_connections > 1
            if (
                kind == "http"
            ):  # obstore may tell of a connection that is closed under a request
                assert device.traffic.retries == 0
