#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `nbdkit --filter=cache cache-max-size=SIZE` bounds the file of the cache. In the default mode, writeback, a block that was
#                      written goes to the plugin before it leaves the cache: nbdkit-cache-filter(1) says that the mode is safe with a client
#                      that flushes, and of the mode "unsafe" that it writes only if the cache grows too large.
# The real behaviour:  what leaves the cache is never written anywhere. When the cache has reached its size, blocks are dropped, and
#                      whether they are dirty is not asked. What was written there is gone at once: it reads as the plugin has it, the old
#                      data. No request fails, also not the FLUSH after it, which writes only what is still there. With cache=writethrough
#                      there is nothing to lose, and it is right.
# What follows:        with cache-max-size use cache=writethrough, or make the maximum larger than the disk (with its high threshold of 95 percent).
#                      A test of a cache has to write more than the cache holds, and to read all of it again.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, Debian 12, amd64. The temporary folder has to be on a file system that can punch
#                      holes (ext4, XFS, btrfs, tmpfs).
# Source:              run by this script; reclaim_block() in filters/cache/reclaim.c (https://gitlab.com/nbdkit/nbdkit) punches a hole and
#                      clears the block's bits, dirty or not.
# The output seen:
#     writeback:                         written and flushed: exit 0, read: the new data, in the file: the new data
#     writeback, cache-max-size=8M:      written and flushed: exit 0, read: new and old data, in the file: new and old data
#     writethrough, cache-max-size=8M:   written and flushed: exit 0, read: the new data, in the file: the new data
#     writeback, cache-max-size=40M:     written and flushed: exit 0, read: the new data, in the file: the new data
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
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
export TMPDIR="$folder" # The filter keeps its cache there.
plugins="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins"
filters="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/filters"
uri="nbd+unix:///?socket=$folder/nbd.sock"

head -c 32M /dev/zero | tr '\0' 'n' >new.img
holds() { # FILE
    case $(tr -s 'no' <"$1" | tr -d '\n' | fold -w 1 | sort -u | paste -sd '') in
    n) echo "the new data" ;;
    no) echo "new and old data" ;;
    *) echo "something else" ;;
    esac
}
try() { # NAME PARAMETER...
    local name=$1 written=0
    shift
    head -c 32M /dev/zero | tr '\0' 'o' >disk.img
    nbdkit --foreground --unix "$folder/nbd.sock" --filter="$filters/nbdkit-cache-filter.so" \
        "$plugins/nbdkit-file-plugin.so" disk.img "$@" 2>nbdkit.log &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    nbdcopy --flush new.img "$uri" || written=$?
    nbdcopy --no-extents "$uri" read.img
    stop_server
    echo "$name written and flushed: exit $written, read: $(holds read.img), in the file: $(holds disk.img)"
}
{
    trap stop_server EXIT
    try "writeback:                        " cache=writeback
    try "writeback, cache-max-size=8M:     " cache=writeback cache-max-size=8M
    try "writethrough, cache-max-size=8M:  " cache=writethrough cache-max-size=8M
    try "writeback, cache-max-size=40M:    " cache=writeback cache-max-size=40M
} | tee seen

cat >expected <<'END'
writeback:                         written and flushed: exit 0, read: the new data, in the file: the new data
writeback, cache-max-size=8M:      written and flushed: exit 0, read: new and old data, in the file: new and old data
writethrough, cache-max-size=8M:   written and flushed: exit 0, read: the new data, in the file: the new data
writeback, cache-max-size=40M:     written and flushed: exit 0, read: the new data, in the file: the new data
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
