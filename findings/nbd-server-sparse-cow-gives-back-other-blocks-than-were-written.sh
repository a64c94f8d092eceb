#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `sparse_cow = true` of nbd-server changes how the file with the differences of a copy-on-write export is laid out, and nothing
#                      else: nbd-server(5) says that the file is then handled as if it were as large as the device, and that this may be faster.
#                      What a client has written, it reads.
# The real behaviour:  the first write to each block of 4 KiB is appended to the file as without the option, but is looked for at the
#                      block's own offset. Unless a client writes all of the disk in order from its beginning, it reads other blocks than it has
#                      written, without an error, or an I/O error where the file is not yet as long. Here 16 blocks that are written from
#                      the last to the first are read in the reverse order.
# What follows:        leave the option away: `copyonwrite = true` alone is right. A test of a block server must not write in order only.
# Version:             nbd-server 1:3.24-1.1, libnbd0 1.14.2-1 with its Python module, Debian 12, amd64.
# Source:              run by this script; expwrite() in nbd-server.c. Changed in 3.27.0 by
#                      https://github.com/NetworkBlockDevice/nbd/pull/177.
# The output seen:
#     copyonwrite, written backwards:            ABCDEFGHIJKLMNOP, read ABCDEFGHIJKLMNOP
#     copyonwrite and sparse_cow, in order:      ABCDEFGHIJKLMNOP, read ABCDEFGHIJKLMNOP
#     copyonwrite and sparse_cow, backwards:     ABCDEFGHIJKLMNOP, read PONMLKJIHGFEDCBA
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
    nbd-server=1:3.24-1.1 libnbd0=1.14.2-1 python3-libnbd=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/bin:$folder/root/usr/bin:$PATH"
export PYTHONPATH="$folder/root/usr/lib/python3/dist-packages"

cat >blocks.py <<'END'
import sys

import nbd

BLOCK = 4096
LETTERS = b"ABCDEFGHIJKLMNOP"


def read(disk: nbd.NBD, block: int) -> str:
    try:
        data = disk.pread(BLOCK, block * BLOCK)
    except nbd.Error:
        return "!"
    return chr(data[0]) if data == data[:1] * BLOCK else "?"


disk = nbd.NBD()
disk.connect_uri(sys.argv[1])
order = range(len(LETTERS))
if "backwards" in sys.argv[2]:
    order = order[::-1]
for block in order:  # It raises an error if the server does not answer with success.
    disk.pwrite(LETTERS[block : block + 1] * BLOCK, block * BLOCK)
print(f"{sys.argv[2]:42} {LETTERS.decode()}, read {''.join(read(disk, block) for block in range(len(LETTERS)))}")
disk.shutdown()
END

try() { # NAME SETTING
    truncate --size 64K disk.img
    printf '[generic]\nunixsock = %s/nbd.sock\n[disk]\nexportname = %s/disk.img\ncopyonwrite = true\n%s\n' "$folder" "$folder" "$2" >conf
    nbd-server -C "$folder/conf" -d >server.log 2>&1 &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    timeout 60 /usr/bin/python3 blocks.py "nbd+unix:///disk?socket=$folder/nbd.sock" "$1"
    stop_server
}
{
    trap stop_server EXIT
    try "copyonwrite, written backwards:" ""
    try "copyonwrite and sparse_cow, in order:" "sparse_cow = true"
    try "copyonwrite and sparse_cow, backwards:" "sparse_cow = true"
} | tee seen

cat >expected <<'END'
copyonwrite, written backwards:            ABCDEFGHIJKLMNOP, read ABCDEFGHIJKLMNOP
copyonwrite and sparse_cow, in order:      ABCDEFGHIJKLMNOP, read ABCDEFGHIJKLMNOP
copyonwrite and sparse_cow, backwards:     ABCDEFGHIJKLMNOP, read PONMLKJIHGFEDCBA
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
