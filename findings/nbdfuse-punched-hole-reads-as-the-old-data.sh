#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a hole that is punched into the file of nbdfuse (`fallocate --punch-hole`) reads as zeroes afterwards: fallocate(2) says
#                      so of every file system that does not refuse the call, and NBD has a request for it, WRITE_ZEROES.
# The real behaviour:  nbdfuse sends TRIM, which is a hint in NBD: a server may do nothing, and what is read afterwards is not
#                      defined. With a server that does nothing the call succeeds and the old data is read. Only
#                      `fallocate --zero-range` becomes WRITE_ZEROES.
# What follows:        programs that punch a hole to get zeroes (qemu-img, cp, loop devices under mkfs) find old data in such a disk. A server that
#                      is used through nbdfuse should let trimmed ranges read as zeroes, or offer no TRIM.
# Version:             nbdfuse of libnbd-bin 1.14.2-1, with nbdkit 1.32.5-1 as the server, Debian 12, amd64. It needs root and /dev/fuse.
# Source:              run by this script.
# The output seen:
#     punch-hole: exit 0, the server got TRIM, read: old data
#     zero-range: exit 0, the server got WRITE_ZEROES, read: zeroes
set -euo pipefail

folder=$(mktemp -d)
server=
fuse=
cleanup() {
    if [ -n "$fuse" ]; then
        kill "$fuse" 2>/dev/null || true # It unmounts, and ends.
        wait "$fuse" 2>/dev/null || true
    fi
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root mount
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    libnbd-bin=1.14.2-1 nbdkit=1.32.5-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-eval-plugin.so"

head -c 64K /dev/zero | tr '\0' 'd' >disk
touch requests
nbdkit --foreground --unix "$folder/nbd.sock" "$plugin" \
    get_size="echo 65536" can_write='exit 0' can_trim='exit 0' can_zero='exit 0' \
    pread="tail -c +\$((\$4 + 1)) $folder/disk | head -c \$3" \
    pwrite="dd of=$folder/disk bs=512 seek=\$((\$4 / 512)) conv=notrunc status=none" \
    trim="echo TRIM >>$folder/requests" \
    zero="echo WRITE_ZEROES >>$folder/requests
          head -c \$3 /dev/zero | dd of=$folder/disk bs=512 seek=\$((\$4 / 512)) conv=notrunc status=none" 2>nbdkit.log &
server=$!
for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
nbdfuse "$folder/mount/disk" "nbd+unix:///?socket=$folder/nbd.sock" >nbdfuse.log 2>&1 &
fuse=$!
for _ in $(seq 100); do [ -s mount/disk ] && break; sleep 0.1; done

try() { # OPTION OFFSET
    local status=0 read="old data"
    : >requests
    fallocate "--$1" --offset "$2" --length 4096 mount/disk || status=$?
    dd if=mount/disk of=part bs=4096 skip=$(($2 / 4096)) count=1 status=none
    ! cmp --quiet --bytes 4096 part /dev/zero || read=zeroes
    echo "$1: exit $status, the server got $(cat requests), read: $read"
}
{
    try punch-hole 0
    try zero-range 8192
} | tee seen

cat >expected <<'END'
punch-hole: exit 0, the server got TRIM, read: old data
zero-range: exit 0, the server got WRITE_ZEROES, read: zeroes
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
