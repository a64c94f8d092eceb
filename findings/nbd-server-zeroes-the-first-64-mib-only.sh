#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a WRITE_ZEROES that nbd-server answers with success has made zeroes of all that it was asked for. The NBD protocol says that
#                      the range then reads as zeroes, and nbd-server tells no maximum that a client would have to keep to.
# The real behaviour:  only the first 64 MiB of each request become zeroes, whatever its length. The rest keeps its old data, and the
#                      answer is success. nbdcopy makes such requests (up to 128 MiB for one hole): a copy of a sparse disk to an
#                      export that has been used before ends with status 0, and is wrong in every second 64 MiB. `qemu-img convert` gets it right,
#                      because it asks for at most 32 MiB at a time.
# What follows:        write to nbd-server with clients that ask for at most 64 MiB of zeroes at a time, or that send the zeroes (with
#                      `nbdcopy --no-extents --sparse=0` the copy is right). A test of WRITE_ZEROES needs a request that is longer
#                      than the server's own buffer.
# Version:             nbd-server 1:3.24-1.1, libnbd-bin, libnbd0 and python3-libnbd 1.14.2-1, qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script; expwrite_zeroes() in nbd-server.c (https://github.com/NetworkBlockDevice/nbd), which writes its
#                      buffer of 64 MiB once for each 64 MiB, always at the offset of the request. It is the same in 3.27.1.
# The output seen:
#     (each sign is 8 MiB: # has the old data, . has zeroes)
#     WRITE_ZEROES of 64 MiB:                        exit 0, ........########################
#     WRITE_ZEROES of 192 MiB:                       exit 0, ........########################
#     nbdcopy of 256 MiB of zeroes:                  exit 0, ........########........########
#     nbdcopy --no-extents --sparse=0 of the same:   exit 0, ................................
#     qemu-img convert of the same:                  exit 0, ................................
set -euo pipefail

folder=$(mktemp -d)
server=
stop_server() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
    rm -f "$folder/nbd.sock"
}
cleanup() {
    stop_server
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    nbd-server=1:3.24-1.1 libnbd-bin=1.14.2-1 libnbd0=1.14.2-1 python3-libnbd=1.14.2-1 \
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/bin:$folder/root/usr/bin:$PATH"
export PYTHONPATH="$folder/root/usr/lib/python3/dist-packages"
uri="nbd+unix:///disk?socket=$folder/nbd.sock"

cat >conf <<END
[generic]
    unixsock = $folder/nbd.sock
[disk]
    exportname = $folder/disk.img
    flush = true
END
cat >zero.py <<'END'
import sys

import nbd

disk = nbd.NBD()
disk.connect_uri(sys.argv[1])
disk.zero(int(sys.argv[2]) << 20, 0)  # It raises an error if the server does not answer with success.
disk.shutdown()
END
cat >picture.py <<'END'
PART = 8 << 20

with open("disk.img", "rb") as disk:
    parts = list(iter(lambda: disk.read(PART), b""))
print("".join("." if part == bytes(PART) else "#" if part == b"x" * PART else "?" for part in parts))
END

truncate --size 256M sparse.img
try() { # NAME COMMAND...
    local name=$1 status=0
    shift
    head -c 256M /dev/zero | tr '\0' 'x' >disk.img
    nbd-server -C "$folder/conf" -d >server.log 2>&1 & # With -d it serves one client at a time.
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    timeout 100 "$@" || status=$?
    stop_server
    printf '%-46s exit %d, %s\n' "$name" "$status" "$(python3 picture.py)"
}
{
    trap stop_server EXIT
    try "WRITE_ZEROES of 64 MiB:" /usr/bin/python3 zero.py "$uri" 64
    try "WRITE_ZEROES of 192 MiB:" /usr/bin/python3 zero.py "$uri" 192
    try "nbdcopy of 256 MiB of zeroes:" nbdcopy --connections=1 --flush sparse.img "$uri"
    try "nbdcopy --no-extents --sparse=0 of the same:" nbdcopy --no-extents --sparse=0 --connections=1 --flush sparse.img "$uri"
    try "qemu-img convert of the same:" qemu-img convert -n -f raw -O raw sparse.img "$uri"
} | tee seen

cat >expected <<'END'
WRITE_ZEROES of 64 MiB:                        exit 0, ........########################
WRITE_ZEROES of 192 MiB:                       exit 0, ........########################
nbdcopy of 256 MiB of zeroes:                  exit 0, ........########........########
nbdcopy --no-extents --sparse=0 of the same:   exit 0, ................................
qemu-img convert of the same:                  exit 0, ................................
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
