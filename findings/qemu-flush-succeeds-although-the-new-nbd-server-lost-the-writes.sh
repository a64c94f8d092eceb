#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      with `reconnect-delay`, QEMU's NBD driver waits for a server that has crashed, and goes on with the next one. If
#                      the first one had answered WRITEs that no FLUSH has followed, then the next flush fails: these writes
#                      may be lost, and QEMU knows of them.
# The real behaviour:  the flush is sent to the next server, and succeeds. What the first server had answered and not made durable is gone,
#                      and no request of the guest ever fails. Without `reconnect-delay` the flush fails.
# What follows:        a guest's database that was told of a durable commit may have none. Use `reconnect-delay` only with servers whose
#                      answered writes survive their crash (in the page cache of a machine that goes on running, for example),
#                      or with `cache=writethrough`.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, with nbdkit 1.32.5-1 as the server and libnbd 1.14.2-1 as the guest, Debian 12, amd64.
# Source:              run by this script. The server keeps writes in a file that its crash takes along, until it is told to flush.
# The output seen:
#     reconnect-delay 0: write succeeds, crash, next server, flush fails; the disk holds what was there before
#     reconnect-delay 20: write succeeds, crash, next server, flush succeeds; the disk holds what was there before
set -euo pipefail

folder=$(mktemp -d)
server=
crash() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
    rm -f "$folder/volatile" "$folder/nbd.sock"
}
qemu=
stop_qemu() {
    if [ -n "$qemu" ]; then
        kill -KILL "$qemu" 2>/dev/null || true
        wait "$qemu" 2>/dev/null || true
        qemu=
    fi
    rm -f "$folder/qemu.sock"
}
stop_servers() {
    crash
    stop_qemu
}
cleanup() {
    stop_servers
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1 python3-libnbd=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-eval-plugin.so"

start_server() {
    cp durable volatile
    nbdkit --foreground --unix "$folder/nbd.sock" "$plugin" \
        get_size="stat -c %s $folder/durable" can_write='exit 0' can_flush='exit 0' \
        pread="tail -c +\$((\$4 + 1)) $folder/volatile | head -c \$3" \
        pwrite="dd of=$folder/volatile bs=512 seek=\$((\$4 / 512)) conv=notrunc status=none" \
        flush="cp $folder/volatile $folder/durable" 2>>nbdkit.log &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
}

cat >client.py <<'END'
# Asks qemu-nbd, which asks the server. Each line of standard input is a request; its outcome is printed.
import sys
import nbd

client = nbd.NBD()
client.connect_unix(sys.argv[1])
for line in sys.stdin:
    try:
        if line == "write\n":
            client.pwrite(b"\xaa" * 4096, 0)
        else:
            client.flush()
        print("succeeds", flush=True)
    except nbd.Error:
        print("fails", flush=True)
END

outcome= # of the request asked last
ask() { # REQUEST
    echo "$1" >&"${CLIENT[1]}"
    read -r -t 60 outcome <&"${CLIENT[0]}" || { echo "no answer to $1"; exit 1; }
}

try() { # DELAY
    local told holds="what was there before"
    head -c 64K /dev/zero >durable
    start_server
    qemu-nbd --persistent --cache=writeback --socket "$folder/qemu.sock" --image-opts "driver=raw,file.driver=nbd,\
file.server.type=unix,file.server.path=$folder/nbd.sock,file.reconnect-delay=$1" 2>>qemu.log &
    qemu=$!
    for _ in $(seq 100); do [ -S qemu.sock ] && break; sleep 0.1; done
    coproc CLIENT { PYTHONPATH="$folder/root/usr/lib/python3/dist-packages" /usr/bin/python3 client.py "$folder/qemu.sock"; }
    ask write
    told="write $outcome, crash"
    crash
    start_server
    ask flush
    told+=", next server, flush $outcome"
    cmp --quiet --bytes 4096 volatile /dev/zero || holds="what was written"
    echo "reconnect-delay $1: $told; the disk holds $holds"
    exec {CLIENT[1]}>&-
    wait "$CLIENT_PID" || true
    crash
    stop_qemu
}

{
    # Because of the pipe, these braces are a process of their own, and only it knows the servers.
    trap stop_servers EXIT
    try 0
    try 20
} | tee seen

cat >expected <<'END'
reconnect-delay 0: write succeeds, crash, next server, flush fails; the disk holds what was there before
reconnect-delay 20: write succeeds, crash, next server, flush succeeds; the disk holds what was there before
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
