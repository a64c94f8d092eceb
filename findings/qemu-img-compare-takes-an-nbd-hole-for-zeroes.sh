#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `qemu-img compare` reads both images and compares bytes, so an NBD export and a file with the same
#                      content are "identical", whatever base:allocation says about holes; NBD's specification says that
#                      a hole without NBD_STATE_ZERO may have any content.
# The real behaviour:  a range that the server describes with NBD_STATE_HOLE alone is compared as if it were zeroes:
#                      "Content mismatch at offset 0!", exit 1, although `qemu-img convert`, `qemu-io` and `nbdcopy` all read the
#                      server's real bytes there.
# What follows:        a server that reports HOLE must report ZERO with it, or its clients do not agree on what it holds.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, Debian 12, amd64.
# Source:              run by this script; the NBD protocol, "base:allocation metadata context".
# The output seen:
#     the server says:   0 1048576 1 hole
#     convert copies:    AAAAAAAA
#     nbdcopy copies:    AAAAAAAA
#     qemu-io reads A:   exit 0
#     compare:           exit 1, Content mismatch at offset 0!
set -euo pipefail

folder=$(mktemp -d)
server=
cleanup() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
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
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-eval-plugin.so"

# Every byte is an A, and all of it is called a hole.
nbdkit --foreground --unix "$folder/nbd.sock" "$plugin" get_size='echo 1048576' can_extents='exit 0' \
    pread='head -c $3 /dev/zero | tr "\0" A' extents='echo 0 1048576 hole' 2>nbdkit.log &
server=$!
for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done

uri="nbd+unix:///?socket=$folder/nbd.sock"
qemu-img convert -f raw -O raw "$uri" by-convert
nbdcopy "$uri" by-nbdcopy
read_status=0
qemu-io -f raw -r -c 'read -P 0x41 0 1M' "$uri" >/dev/null 2>&1 || read_status=$?
compare_status=0
compared=$(qemu-img compare -f raw -F raw "$uri" by-convert) || compare_status=$?
{
    echo "the server says:   $(nbdinfo --map "$uri" | tr -s ' ' | sed 's/^ //')"
    echo "convert copies:    $(head -c 8 by-convert)"
    echo "nbdcopy copies:    $(head -c 8 by-nbdcopy)"
    echo "qemu-io reads A:   exit $read_status"
    echo "compare:           exit $compare_status, $compared"
} | tee seen

cat >expected <<'END'
the server says:   0 1048576 1 hole
convert copies:    AAAAAAAA
nbdcopy copies:    AAAAAAAA
qemu-io reads A:   exit 0
compare:           exit 1, Content mismatch at offset 0!
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
