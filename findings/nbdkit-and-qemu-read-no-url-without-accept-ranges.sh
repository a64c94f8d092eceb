#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      nbdkit's curl plugin and QEMU's http driver can open an image on any web server that answers ranges. RFC 9110
#                      leaves it to the server whether it announces that with the field Accept-Ranges; a client may ask for a
#                      range without it, and sees by status 206 that it got one.
# The real behaviour:  both send one HEAD, look for "Accept-Ranges: bytes" in the answer, and give up without it: "server does
#                      not support 'range' (byte range) requests". They never ask for a range.
# What follows:        a web service that answers ranges of images should send the field with HEAD as well. A client does better to ask for a range
#                      and to look at the status.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, qemu-utils and qemu-block-extra 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script; RFC 9110, 14.3 "Accept-Ranges".
# The output seen:
#     with Accept-Ranges:    a range is answered with 206, nbdkit exit 0, qemu-img exit 0
#     without Accept-Ranges: a range is answered with 206, nbdkit exit 1, qemu-img exit 1
#     ranges that the two asked for without Accept-Ranges: 0
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
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 qemu-utils=1:7.2+dfsg-7+deb12u18+b3 \
    qemu-block-extra=1:7.2+dfsg-7+deb12u18+b3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
export QEMU_MODULE_DIR="$folder/root/usr/lib/x86_64-linux-gnu/qemu"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-curl-plugin.so"

head -c 1M /dev/urandom >disk.img
cat >serve_ranges.py <<'END'
import http.server
import re
import sys

with open("disk.img", "rb") as image:
    DISK = image.read()


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.wfile.write(self.answer())

    def answer(self) -> bytes:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        body = DISK
        if asked:
            first = int(asked[1])
            last = min(int(asked[2] or len(DISK)), len(DISK) - 1)
            body = DISK[first : last + 1]
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(DISK)}")
        else:
            self.send_response(200)
        if self.path == "/with":
            self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        return body

    def log_message(self, *_: object) -> None:
        print(self.command, self.path, self.headers.get("Range"), file=sys.stderr)


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
END
python3 serve_ranges.py >port 2>requests &
server=$!
for _ in $(seq 100); do [ -s port ] && break; sleep 0.1; done
web="http://127.0.0.1:$(cat port)"

try() { # PATH
    local by_nbdkit=0 by_qemu=0
    # shellcheck disable=SC2016  # nbdkit sets $uri
    nbdkit --unix - "$plugin" "$web/$1" --run 'nbdcopy "$uri" by-nbdkit' >log 2>&1 || by_nbdkit=$?
    qemu-img convert -O raw "$web/$1" by-qemu >log 2>&1 || by_qemu=$?
    echo "nbdkit exit $by_nbdkit, qemu-img exit $by_qemu"
}
status_of_a_range() { # PATH
    python3 -c "
import sys, urllib.request
asked = urllib.request.Request(sys.argv[1], headers={'Range': 'bytes=4096-8191'})
print(urllib.request.urlopen(asked).status)" "$web/$1"
}
{
    echo "with Accept-Ranges:    a range is answered with $(status_of_a_range with), $(try with)"
    cmp by-nbdkit disk.img && cmp by-qemu disk.img
    echo "without Accept-Ranges: a range is answered with $(status_of_a_range without), $(try without)"
    ranges=$(grep --text --count "GET /without bytes=" requests)
    echo "ranges that the two asked for without Accept-Ranges: $((ranges - 1))"
} | tee seen

cat >expected <<'END'
with Accept-Ranges:    a range is answered with 206, nbdkit exit 0, qemu-img exit 0
without Accept-Ranges: a range is answered with 206, nbdkit exit 1, qemu-img exit 1
ranges that the two asked for without Accept-Ranges: 0
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
