#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      two images with different bytes have different ETags. nginx sends a strong one (without W/), and RFC 9110 says
#                      that a strong validator changes whenever the data does. So a download that is continued with
#                      If-Match or If-Range never mixes two images.
# The real behaviour:  nginx makes the ETag from the time of the file in whole seconds and its size, and from nothing else. An image
#                      that has replaced another one of the same size and time has its ETag: If-Match is
#                      satisfied (206 instead of 412), If-Range too (206 instead of 200), and what was put together is neither image.
# What follows:        images of reproducible builds are of this kind: their size is fixed, and so is their time (SOURCE_DATE_EPOCH). Publish
#                      each version under a name of its own, and compare a checksum when all is copied.
# Version:             nginx-core 1.22.1-9+deb12u11, Debian 12, amd64.
# Source:              run by this script; RFC 9110, 8.8.1 "Weak versus Strong" and 8.8.3 "ETag".
# The output seen:
#     first image:           ETag "65920080-100000"
#     second image:          ETag "65920080-100000"
#     If-Match, second half: status 206
#     If-Range, second half: status 206
#     put together:          it is neither image
set -euo pipefail

folder=$(mktemp -d)
server=
cleanup() {
    if [ -n "$server" ]; then
        kill "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    nginx-core=1.22.1-9+deb12u11 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"

mkdir www
cat >nginx.conf <<END
daemon off;
master_process off;
pid $folder/pid;
error_log $folder/error.log;
events {}
http {
    access_log off;
    client_body_temp_path $folder/body;
    proxy_temp_path $folder/proxy;
    fastcgi_temp_path $folder/fastcgi;
    uwsgi_temp_path $folder/uwsgi;
    scgi_temp_path $folder/scgi;
    server { listen unix:$folder/http.sock; root $folder/www; }
}
END
cat >download.py <<'END'
import http.client
import os
import random
import socket

SIZE = 1 << 20
BUILT = 1704067200  # SOURCE_DATE_EPOCH of both builds


def publish(seed: int) -> bytes:
    image = random.Random(seed).randbytes(SIZE)
    with open("disk.new", "wb") as file:
        file.write(image)
    os.utime("disk.new", (BUILT, BUILT))
    os.replace("disk.new", "www/disk.img")
    return image


def get(**headers: str) -> tuple[int, str | None, bytes]:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect("http.sock")
    connection.request("GET", "/disk.img", headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.headers["ETag"], answer.read()


first = publish(1)
_, etag, beginning = get(Range=f"bytes=0-{SIZE // 2 - 1}")
assert etag is not None
second = publish(2)
_, etag_of_second, _ = get()
print("first image:           ETag", etag)
print("second image:          ETag", etag_of_second)
status, _, rest = get(Range=f"bytes={SIZE // 2}-", If_Match=etag)
print("If-Match, second half: status", status)
status, _, rest = get(Range=f"bytes={SIZE // 2}-", If_Range=etag)
print("If-Range, second half: status", status)
print("put together:          it is", "one of them" if beginning + rest in (first, second) else "neither image")
END

root/usr/sbin/nginx -c "$folder/nginx.conf" -e "$folder/error.log" &
server=$!
for _ in $(seq 100); do [ -S http.sock ] && break; sleep 0.1; done
[ -S http.sock ] || { cat error.log; echo "nginx has not started"; exit 1; }
python3 download.py | tee seen

cat >expected <<'END'
first image:           ETag "65920080-100000"
second image:          ETag "65920080-100000"
If-Match, second half: status 206
If-Range, second half: status 206
put together:          it is neither image
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
