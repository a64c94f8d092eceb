#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `maxconnections = 2` of an export of nbd-server bounds how many clients are connected at a time: when one has left, another one
#                      may come. Its manual page calls it a limit for open connections.
# The real behaviour:  clients that have left are counted, too. After two clients, one after the other, each further one is refused
#                      for as long as the server runs, although no client is connected. An export without the option is not affected.
# What follows:        a disk behind this option can be attached as often as the number says, and then the server must be started again. A client that
#                      connects again by itself (nbd-client -persist, QEMU) uses the number up.
# Version:             nbd-server 1:3.24-1.1, libnbd-bin 1.14.2-1, Debian 12, amd64. The report https://github.com/NetworkBlockDevice/nbd/issues/126
#                      is about it.
# Source:              run by this script.
# The output seen:
#     maxconnections = 2: clients one after the other: served served refused refused
#     without: clients one after the other: served served served served
#     maxconnections = 2, ten seconds later: refused
set -euo pipefail

folder=$(mktemp -d)
stop_server() { # It makes a process of its own, which has the name of its configuration file in its command.
    pkill -KILL -f "nbd-server -C $folder/conf" 2>/dev/null || true
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
    nbd-server=1:3.24-1.1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/bin:$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
truncate --size 16M disk.img

start_server() { # SETTING
    printf '[generic]\nunixsock = %s/nbd.sock\nlistenaddr = 127.0.0.1\nport = 20809\n[d]\n%s\nexportname = %s/disk.img\n' \
        "$folder" "$1" "$folder" >conf
    nbd-server -C "$folder/conf" >server.log 2>&1
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
}
client() { # One that asks for the size and leaves.
    if nbdinfo --size "nbd+unix:///d?socket=$folder/nbd.sock" >client.log 2>&1; then
        echo served
    elif grep -q 'server policy' client.log; then
        echo refused
    else
        cat client.log
    fi
}
four() { for _ in 1 2 3 4; do client; sleep 0.5; done | paste -sd' '; }
{
    start_server 'maxconnections = 2'
    echo "maxconnections = 2: clients one after the other: $(four)"
    sleep 10
    later=$(client)
    stop_server
    start_server ''
    echo "without: clients one after the other: $(four)"
    stop_server
    echo "maxconnections = 2, ten seconds later: $later"
} | tee seen

cat >expected <<'END'
maxconnections = 2: clients one after the other: served served refused refused
without: clients one after the other: served served served served
maxconnections = 2, ten seconds later: refused
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
