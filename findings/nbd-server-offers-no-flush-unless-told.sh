#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      an export that nbd-server writes through the page cache offers NBD_FLAG_SEND_FLUSH, so that a client's sync
#                      reaches the disk.
# The real behaviour:  unless the export's section says `flush = true`, the flag is not offered, and the server never syncs: not during
#                      the connection, and not at its end. QEMU takes the missing flag for "there is no volatile cache": its flush
#                      succeeds without a request. With `sync = true` there is still no flag, and each write is synced.
# What follows:        a disk on an nbd-server with a minimal configuration loses what was synced when the server's machine loses power.
#                      A client can see it: `nbdinfo` prints can_flush. An origin or source on such a server is only as safe as that.
# Version:             nbd-server 1:3.24-1.1, qemu-utils 1:7.2+dfsg-7+deb12u18+b3, libnbd-bin 1.14.2-1, strace 6.1-0.1, Debian 12, amd64.
# Source:              run by this script; nbd-server(5), "flush" and "sync".
# The output seen:
#     '': can_flush: false, exit of writes and a flush 0, no syncs by the server
#     'flush = true': can_flush: true, exit of writes and a flush 0, some syncs by the server
#     'sync = true': can_flush: false, exit of writes and a flush 0, some syncs by the server
set -euo pipefail

folder=$(mktemp -d)
server=
stop_server() { # It is strace, and nbd-server is its child.
    if [ -n "$server" ]; then
        pkill -KILL -P "$server" 2>/dev/null || true
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
    nbd-server=1:3.24-1.1 qemu-utils=1:7.2+dfsg-7+deb12u18+b3 libnbd-bin=1.14.2-1 strace=6.1-0.1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
export PATH="$folder/root/bin:$PATH"
truncate --size 16M disk.img
uri="nbd+unix:///d?socket=$folder/nbd.sock"
client() {
    # The server, which serves one client and ends, with its calls for a sync in a file.
    rm -f nbd.sock
    strace -f -qq -e trace=fsync,fdatasync,sync_file_range,msync,syncfs,sync -o calls \
        nbd-server -C conf -d 2>/dev/null &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    "$@"
    wait "$server" || true
    server=
}
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    for setting in '' 'flush = true' 'sync = true'; do
        printf '[generic]\nunixsock = %s/nbd.sock\n[d]\n%s\nexportname = %s/disk.img\n' "$folder" "$setting" "$folder" >conf
        client nbdinfo "$uri" >info
        status=0
        client qemu-io -f raw -c 'write 0 4k' -c 'write 8k 4k' -c flush "$uri" >qemu-io.log 2>&1 || status=$?
        synced="some"
        if [ "$(wc -l <calls)" = 0 ]; then synced="no"; fi
        echo "'$setting': $(grep -o 'can_flush: .*' info), exit of writes and a flush $status, $synced syncs by the server"
    done
} | tee seen

cat >expected <<'END'
'': can_flush: false, exit of writes and a flush 0, no syncs by the server
'flush = true': can_flush: true, exit of writes and a flush 0, some syncs by the server
'sync = true': can_flush: false, exit of writes and a flush 0, some syncs by the server
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
