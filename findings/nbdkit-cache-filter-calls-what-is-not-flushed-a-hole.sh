#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `nbdkit --filter=cache` is a cache in front of a disk: a client that reads gets what was written last, from the cache or
#                      from the disk. That data is lost if the server crashes before a flush is known; for as long as it runs,
#                      a copy of the export is a copy of what was written.
# The real behaviour:  reads come from the cache, but block status is asked of the plugin under it, which has not seen the data yet. What
#                      was written to a hole of the disk is said to be "hole,zero" until it is flushed. So nbdcopy and
#                      `qemu-img convert` do not read it: both exit with 0, and the copy has zeroes there, although a READ at
#                      the same moment returns the data. With cache=unsafe a flush does not help either.
# What follows:        a layer that answers reads from its own store must answer block status from it, too. With this filter, flush before another
#                      client copies, or put `--filter=noextents` before `--filter=cache`.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script; filters/cache/cache.c has no function for extents. nbdkit-cache-filter(1) says that it caches contents
#                      and not metadata, but not that the two then contradict each other.
# The output seen:
#     cache=writeback, written:       map: hole,zero, read: the data, nbdcopy exit 0: zeroes, qemu-img exit 0: zeroes
#     cache=writeback, and flushed:   map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
#     cache=unsafe, and flushed:      map: hole,zero, read: the data, nbdcopy exit 0: zeroes, qemu-img exit 0: zeroes
#     cache=writethrough, written:    map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
#     with noextents before it:       map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
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
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 qemu-utils=1:7.2+dfsg-7+deb12u18+b3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
export TMPDIR="$folder" # The filter keeps its cache there.
plugins="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins"
filters="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/filters"
cache=--filter="$filters/nbdkit-cache-filter.so"
noextents=--filter="$filters/nbdkit-noextents-filter.so"
uri="nbd+unix:///?socket=$folder/nbd.sock"

head -c 4M /dev/zero | tr '\0' 'D' >written.img
holds() { # FILE
    if cmp --quiet "$1" written.img; then
        echo "the data"
    elif cmp --quiet "$1" <(head -c 4M /dev/zero); then
        echo "zeroes"
    else
        echo "a mixture"
    fi
}
try() { # NAME MODE OPTION-OF-NBDCOPY FILTER...
    local name=$1 mode=$2 option=$3 by_nbdcopy=0 by_qemu=0
    shift 3
    rm -f disk.img by-read by-nbdcopy by-qemu
    truncate --size 4M disk.img
    nbdkit --foreground --unix "$folder/nbd.sock" "$@" "$plugins/nbdkit-file-plugin.so" disk.img "cache=$mode" 2>nbdkit.log &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    # nbdcopy flushes only if it is told to.
    nbdcopy ${option:+"$option"} written.img "$uri"
    local map
    map=$(nbdinfo --map --totals "$uri" | awk '{print $4}' | paste -sd+)
    nbdcopy --no-extents "$uri" by-read
    nbdcopy "$uri" by-nbdcopy || by_nbdcopy=$?
    qemu-img convert -f raw -O raw "$uri" by-qemu || by_qemu=$?
    stop_server
    echo "$name map: $map, read: $(holds by-read), nbdcopy exit $by_nbdcopy: $(holds by-nbdcopy)," \
        "qemu-img exit $by_qemu: $(holds by-qemu)"
}
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    try "cache=writeback, written:      " writeback "" "$cache"
    try "cache=writeback, and flushed:  " writeback --flush "$cache"
    try "cache=unsafe, and flushed:     " unsafe --flush "$cache"
    try "cache=writethrough, written:   " writethrough "" "$cache"
    try "with noextents before it:      " writeback "" "$noextents" "$cache"
} | tee seen

cat >expected <<'END'
cache=writeback, written:       map: hole,zero, read: the data, nbdcopy exit 0: zeroes, qemu-img exit 0: zeroes
cache=writeback, and flushed:   map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
cache=unsafe, and flushed:      map: hole,zero, read: the data, nbdcopy exit 0: zeroes, qemu-img exit 0: zeroes
cache=writethrough, written:    map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
with noextents before it:       map: data, read: the data, nbdcopy exit 0: the data, qemu-img exit 0: the data
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
