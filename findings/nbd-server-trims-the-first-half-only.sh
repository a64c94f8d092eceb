#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      an export of nbd-server with `trim = true` gives the space of a trimmed range back wherever the range lies: the server
#                      punches a hole into the file. If it cannot, it may leave the data there.
# The real behaviour:  it punches holes in the first half of the disk only. A TRIM that starts in the second half is answered with success and frees
#                      nothing. One that starts in the first half is cut short, without a word: no more is freed than the size of the
#                      disk less twice the offset. A TRIM of the whole disk, which starts at 0, does free all of it.
# What follows:        a client that trims its free space gets nothing back of what lies in the second half, and is told that it was all. An administrator who
#                      pays for the space should look at the file (`du`). And a test of TRIM at offset 0, as
#                      nbd-server's tests/code/trim.c is, says little.
# Version:             nbd-server 1:3.24-1.1, libnbd0 1.14.2-1 with its Python module, Debian 12, amd64. The temporary folder has to be on a
#                      file system that can punch holes (ext4, XFS, btrfs, tmpfs).
# Source:              run by this script; exptrim() in nbdsrv.c, and tests/code/trim.c. The wrong length was reported on the list
#                      nbd@other.debian.org on 2 May 2021 ("nbd-server: invalid length for trim requests").
# The output seen:
#     each of 16 MiB trimmed, 16 successes:         ........########, 8 of 16 MiB on the disk
#     MiB 6 to 15 trimmed in one piece, 1 success:  ######....######, 12 of 16 MiB on the disk
#     the whole disk trimmed, 1 success:            ................, 0 of 16 MiB on the disk
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

cat >conf <<END
[generic]
    unixsock = $folder/nbd.sock
[disk]
    exportname = $folder/disk.img
    trim = true
END
cat >trim.py <<'END'
import os
import sys

import nbd

MIB = 1 << 20

disk = nbd.NBD()
disk.connect_uri(sys.argv[1])
successes = 0
for piece in sys.argv[3:]:
    first, count = map(int, piece.split("+"))
    disk.trim(count * MIB, first * MIB)  # It raises an error if the server does not answer with success.
    successes += 1
parts = [disk.pread(MIB, part * MIB) for part in range(disk.get_size() // MIB)]
disk.shutdown()
picture = "".join("." if part == bytes(MIB) else "#" for part in parts)
space = os.stat("disk.img").st_blocks * 512 // MIB
said = f"{sys.argv[2]}, {successes} success{'es' if successes > 1 else ''}:"
print(f"{said:45} {picture}, {space} of {len(parts)} MiB on the disk")
END

try() { # NAME PIECE...
    local name=$1
    shift
    head -c 16M /dev/zero | tr '\0' 'x' >disk.img
    nbd-server -C "$folder/conf" -d >server.log 2>&1 &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    /usr/bin/python3 trim.py "nbd+unix:///disk?socket=$folder/nbd.sock" "$name" "$@"
    stop_server
}
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    # shellcheck disable=SC2046  # one word for each piece
    try "each of 16 MiB trimmed" $(seq --format '%g+1' 0 15)
    try "MiB 6 to 15 trimmed in one piece" 6+10
    try "the whole disk trimmed" 0+16
} | tee seen

cat >expected <<'END'
each of 16 MiB trimmed, 16 successes:         ........########, 8 of 16 MiB on the disk
MiB 6 to 15 trimmed in one piece, 1 success:  ######....######, 12 of 16 MiB on the disk
the whole disk trimmed, 1 success:            ................, 0 of 16 MiB on the disk
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
