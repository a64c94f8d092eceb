#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      an image that is downloaded in part, and replaced on the server meanwhile, is sent from the start if the client continues with
#                      "If-Range: the ETag that I have" (or the Last-Modified that it has). RFC 9110 says that a server MUST ignore Range if
#                      the validator does not match. So all servers that send validators and answer ranges do that.
# The real behaviour:  Tornado's static file service does not look at If-Range at all, and aiohttp's looks at dates only: it ignores the
#                      ETag that it has sent itself. They answer 206 with the end of the new image, and what the client puts
#                      together is neither image. werkzeug answers 200, but like Tornado it does not look at If-Match: of the three, only
#                      aiohttp refuses a range of another image with 412.
# What follows:        a client that continues a download, or reads an image in ranges, must compare the ETag, Last-Modified and the whole
#                      length in Content-Range of each answer with those that it knows, whatever conditions it has sent.
# Version:             aiohttp 3.14.5, tornado 6.6.1, werkzeug 3.1.9, CPython 3.11.
# Source:              run by this script; RFC 9110, 13.1.1 "If-Match" and 13.1.5 "If-Range". A change of aiohttp was merged after this version
#                      (https://github.com/aio-libs/aiohttp/pull/13480).
# The output seen:
#     aiohttp   If-Range with ETag: 206, a mixture; with date: 200, the new image; If-Match: 412
#     tornado   If-Range with ETag: 206, a mixture; with date: 206, a mixture; If-Match: 206
#     werkzeug  If-Range with ETag: 200, the new image; with date: 200, the new image; If-Match: 206
set -euo pipefail

folder=$(mktemp -d)
server=
stop_server() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
    rm -f "$folder/http.sock"
}
cleanup() {
    stop_server
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --no-compile \
    aiohttp==3.14.5 tornado==6.6.1 werkzeug==3.1.9

mkdir www
cat >serve.py <<'END'
import asyncio
import os
import sys


def aiohttp() -> None:
    from aiohttp import web

    app = web.Application()
    app.router.add_static("/", "www")
    web.run_app(app, path="http.sock", print=None)


def tornado() -> None:
    from tornado import httpserver, netutil, web

    async def serve() -> None:
        app = web.Application([("/(.*)", web.StaticFileHandler, {"path": "www"})])
        httpserver.HTTPServer(app).add_socket(netutil.bind_unix_socket("http.sock"))
        await asyncio.Event().wait()

    asyncio.run(serve())


def werkzeug() -> None:
    from werkzeug import Request, Response, run_simple, utils

    @Request.application
    def app(request: Request) -> Response:
        return utils.send_from_directory(os.path.abspath("www"), request.path[1:], request.environ)

    run_simple("unix://http.sock", 0, app)


globals()[sys.argv[1]]()
END
cat >download.py <<'END'
import http.client
import os
import socket
import sys
import time

HALF = 1 << 19


def publish(letter: bytes, length: int, when: int) -> None:
    with open("www/disk.new", "wb") as file:
        file.write(letter * length)
    os.utime("www/disk.new", (when, when))
    os.replace("www/disk.new", "www/disk.img")


def get(**fields: str) -> tuple[http.client.HTTPResponse, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.settimeout(20)
    connection.sock.connect("http.sock")
    connection.request("GET", "/disk.img", headers={name.replace("_", "-"): value for name, value in fields.items()})
    answer = connection.getresponse()
    return answer, answer.read()


def put_together(validator: str) -> str:
    publish(b"1", 2 * HALF, 1700000000)
    _, start = get(Range=f"bytes=0-{HALF - 1}")
    publish(b"2", 2 * HALF + 512, 1800000000)
    answer, rest = get(Range=f"bytes={HALF}-", If_Range=validator)
    whole = start + rest if answer.status == 206 else rest
    return f"{answer.status}, {'a mixture' if len(set(whole)) > 1 else 'the new image'}"


for _ in range(200):
    try:
        publish(b"1", 2 * HALF, 1700000000)
        first, _ = get()
        break
    except OSError:
        time.sleep(0.1)
etag, modified = first.headers["ETag"], first.headers["Last-Modified"]
by_etag, by_date = put_together(etag), put_together(modified)
match = get(Range=f"bytes={HALF}-", If_Match=etag)[0].status
print(f"{sys.argv[1]:9} If-Range with ETag: {by_etag}; with date: {by_date}; If-Match: {match}")
END

{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    for name in aiohttp tornado werkzeug; do
        venv/bin/python serve.py $name >server.log 2>&1 &
        server=$!
        timeout 60 venv/bin/python download.py $name
        stop_server
    done
} | tee seen

cat >expected <<'END'
aiohttp   If-Range with ETag: 206, a mixture; with date: 200, the new image; If-Match: 412
tornado   If-Range with ETag: 206, a mixture; with date: 206, a mixture; If-Match: 206
werkzeug  If-Range with ETag: 200, the new image; with date: 200, the new image; If-Match: 206
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
