#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a server that answers ranges with 206 can be read in pieces of one size: a range that ends behind the end of the file is
#                      answered with what there is, as RFC 9110 says. And "bytes=0-0" gets one byte, and the length of the file with it.
# The real behaviour:  Sanic sends what there is, but its Content-Range goes behind the end of the file: RFC 9110 calls such a field invalid, and
#                      forbids clients to put the piece together with others. webfs answers 400. WhiteNoise answers 416 to a range of one
#                      byte. busybox httpd answers "bytes=0-0" as if it had no end: with status 206 and the whole file.
# What follows:        ask for the length first, by HEAD, and never for more than there is; do not ask for one byte to learn the length. Compare
#                      Content-Range with what was asked for, and do not read on when it is more. Starlette, for comparison, gets all of it right.
# Version:             sanic 25.12.1, whitenoise 6.12.0 on waitress 3.0.2, starlette 1.10.0 on uvicorn 0.54.0, CPython 3.11;
#                      busybox-static 1:1.35.0-4+deb12u1+b1, webfs 1.21+ds1-12+b1, Debian 12, amd64.
# Source:              run by this script; RFC 9110, 14.1.2 "Byte Ranges" and 14.4 "Content-Range".
# The output seen:
#     starlette  0-99:           206, bytes 0-99/1000000, 100 bytes of the image
#     starlette  0-0:            206, bytes 0-0/1000000, 1 bytes of the image
#     starlette  983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
#     sanic      0-99:           206, bytes 0-99/1000000, 100 bytes of the image
#     sanic      0-0:            206, bytes 0-0/1000000, 1 bytes of the image
#     sanic      983040-1048575: 206, bytes 983040-1048575/1000000, 16960 bytes of the image
#     whitenoise 0-99:           206, bytes 0-99/1000000, 100 bytes of the image
#     whitenoise 0-0:            416
#     whitenoise 983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
#     webfs      0-99:           206, bytes 0-99/1000000, 100 bytes of the image
#     webfs      0-0:            206, bytes 0-0/1000000, 1 bytes of the image
#     webfs      983040-1048575: 400
#     busybox    0-99:           206, bytes 0-99/1000000, 100 bytes of the image
#     busybox    0-0:            206, bytes 0-999999/1000000, 1000000 bytes of the image
#     busybox    983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
set -euo pipefail

folder=$(mktemp -d)
server=
stop_server() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
}
cleanup() {
    stop_server
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --no-compile sanic==25.12.1 whitenoise==6.12.0 waitress==3.0.2 \
    starlette==1.10.0 uvicorn==0.54.0

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    busybox-static=1:1.35.0-4+deb12u1+b1 webfs=1.21+ds1-12+b1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done

mkdir www
head -c 1000000 /dev/urandom >www/disk.img

cat >serve.py <<'END'
import sys


def sanic(port: int) -> None:
    from sanic import Sanic

    app = Sanic("images")
    app.static("/disk.img", "www/disk.img", use_content_range=True)
    app.run("127.0.0.1", port, single_process=True, access_log=False)


def whitenoise(port: int) -> None:
    import waitress
    from whitenoise import WhiteNoise

    waitress.serve(WhiteNoise(lambda environ, start: [], root="www"), host="127.0.0.1", port=port)


def starlette(port: int) -> None:
    import uvicorn
    from starlette.staticfiles import StaticFiles

    uvicorn.run(StaticFiles(directory="www"), host="127.0.0.1", port=port, log_level="warning")


globals()[sys.argv[1]](int(sys.argv[2]))
END
cat >ask.py <<'END'
import http.client
import sys
import time

with open("www/disk.img", "rb") as file:
    DISK = file.read()


def ask(first: int, last: int) -> str:
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[2]), timeout=20)
    connection.request("GET", "/disk.img", headers={"Range": f"bytes={first}-{last}"})
    answer = connection.getresponse()
    if answer.status != 206:
        return str(answer.status)
    body = answer.read()
    right = "of the image" if body == DISK[first : first + len(body)] else "of something else"
    return f"206, {answer.headers['Content-Range']}, {len(body)} bytes {right}"


for _ in range(200):
    try:
        ask(0, 99)
        break
    except OSError:
        time.sleep(0.1)
print(f"{sys.argv[1]:10} 0-99:           {ask(0, 99)}")
print(f"{sys.argv[1]:10} 0-0:            {ask(0, 0)}")
print(f"{sys.argv[1]:10} 983040-1048575: {ask(983040, 1048575)}")
END

try() { # NAME COMMAND...: the port is added to the command.
    local name=$1 port
    shift
    port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
    "${@//PORT/$port}" >server.log 2>&1 &
    server=$!
    timeout 60 venv/bin/python ask.py "$name" "$port"
    stop_server
}
{
    trap stop_server EXIT
    try starlette venv/bin/python serve.py starlette PORT
    try sanic venv/bin/python serve.py sanic PORT
    try whitenoise venv/bin/python serve.py whitenoise PORT
    try webfs root/usr/bin/webfsd -F -i 127.0.0.1 -p PORT -r "$folder/www"
    try busybox root/bin/busybox httpd -f -p 127.0.0.1:PORT -h www
} | tee seen

cat >expected <<'END'
starlette  0-99:           206, bytes 0-99/1000000, 100 bytes of the image
starlette  0-0:            206, bytes 0-0/1000000, 1 bytes of the image
starlette  983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
sanic      0-99:           206, bytes 0-99/1000000, 100 bytes of the image
sanic      0-0:            206, bytes 0-0/1000000, 1 bytes of the image
sanic      983040-1048575: 206, bytes 983040-1048575/1000000, 16960 bytes of the image
whitenoise 0-99:           206, bytes 0-99/1000000, 100 bytes of the image
whitenoise 0-0:            416
whitenoise 983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
webfs      0-99:           206, bytes 0-99/1000000, 100 bytes of the image
webfs      0-0:            206, bytes 0-0/1000000, 1 bytes of the image
webfs      983040-1048575: 400
busybox    0-99:           206, bytes 0-99/1000000, 100 bytes of the image
busybox    0-0:            206, bytes 0-999999/1000000, 1000000 bytes of the image
busybox    983040-1048575: 206, bytes 983040-999999/1000000, 16960 bytes of the image
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
