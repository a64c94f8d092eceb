#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      fio with `--ioengine=nbd --sync=1` (or `--sync=dsync`) sends each write with FUA, or a FLUSH after each write, as
#                      its other engines open the file with O_SYNC or O_DSYNC. The server offers both.
# The real behaviour:  it sends neither. The option is accepted without a word, and the job ends with 0: what it measured
#                      are ordinary writes, which the server may lose.
# What follows:        figures of "synchronous writes" from this engine compare write caches. Use `--fsync=1`, which
#                      sends a FLUSH between the writes, and count FLUSH and FUA at the server.
# Version:             fio 3.33-3, nbdkit 1.32.5-1, Debian 12, amd64.
# Source:              run by this script; fio(1), "sync".
# The output seen:
#     --sync=1: exit 0, 16 writes, 0 of them with FUA, 0 flushes
#     --sync=dsync: exit 0, 16 writes, 0 of them with FUA, 0 flushes
#     --sync=1 --direct=1: exit 0, 16 writes, 0 of them with FUA, 0 flushes
#     --fsync=1: exit 0, 16 writes, 0 of them with FUA, 15 flushes
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
    fio=3.33-3 nbdkit=1.32.5-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugins="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins"
filters="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/filters"

nbdkit --foreground --unix "$folder/nbd.sock" --filter="$filters/nbdkit-log-filter.so" \
    "$plugins/nbdkit-memory-plugin.so" 16M logfile="$folder/requests" 2>nbdkit.log &
server=$!
for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
uri="nbd+unix:///?socket=$folder/nbd.sock"

for option in --sync=1 --sync=dsync '--sync=1 --direct=1' --fsync=1; do
    : >requests
    status=0
    # shellcheck disable=SC2086  # an option may be two words
    fio --name=job --ioengine=nbd --uri="$uri" --rw=write --bs=4k --size=64k --iodepth=1 $option >fio.log 2>&1 || status=$?
    count() { grep --text --count "$1" requests || true; }
    echo "$option: exit $status, $(count " Write id=") writes, $(count " Write id=.* fua=1") of them with FUA," \
        "$(count " Flush id=") flushes"
done | tee seen

cat >expected <<'END'
--sync=1: exit 0, 16 writes, 0 of them with FUA, 0 flushes
--sync=dsync: exit 0, 16 writes, 0 of them with FUA, 0 flushes
--sync=1 --direct=1: exit 0, 16 writes, 0 of them with FUA, 0 flushes
--fsync=1: exit 0, 16 writes, 0 of them with FUA, 15 flushes
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
