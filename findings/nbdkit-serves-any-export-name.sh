#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a client that asks an NBD server for an export that does not exist is refused, as the specification has it
#                      (NBD_REP_ERR_UNKNOWN). nbdkit lists one export, with the empty name, so "databse" is refused.
# The real behaviour:  nbdkit's file plugin does not look at the name: every name is the one disk. Reads and writes of a client
#                      with a mistyped name go to that disk, and succeed. qemu-nbd and nbd-server refuse the name.
# What follows:        with nbdkit the name in a URI protects from nothing. One who serves several disks with one nbdkit each, and
#                      confuses the ports, overwrites another disk. `--filter=exportname` with `exportname-strict=true` makes nbdkit refuse.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, qemu-utils 1:7.2+dfsg-7+deb12u18+b3, nbd-server 1:3.24-1.1, Debian 12, amd64.
# Source:              run by this script; the NBD protocol, "NBD_OPT_GO".
# The output seen:
#     nbdkit lists:                      export="":
#     nbdkit, nbdcopy to "databse":      exit 0, the disk has changed
#     nbdkit, exportname-strict=true:    exit 1, the disk is as it was
#     qemu-nbd, nbdcopy to "databse":    exit 1, the disk is as it was
#     nbd-server, nbdcopy to "databse":  exit 1, the disk is as it was
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
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbd-server=1:3.24-1.1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$folder/root/bin:$PATH"
lib="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit"

head -c 1M /dev/zero | tr '\0' n >new.img
serve() { # COMMAND: serves disk.img on nbd.sock.
    stop_server
    head -c 1M /dev/zero | tr '\0' o >disk.img
    "$@" >server.log 2>&1 &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    [ -S nbd.sock ] || { cat server.log; echo "the server has not started"; exit 1; }
}
knows_database() {
    nbdinfo --size "nbd+unix:///database?socket=$folder/nbd.sock" >client.log 2>&1 || { cat client.log; exit 1; }
}
copy() { # LABEL
    local status=0 disk="the disk has changed"
    nbdcopy new.img "nbd+unix:///databse?socket=$folder/nbd.sock" 2>client.log || status=$?
    if [ "$(head -c 1 disk.img)" = o ]; then disk="the disk is as it was"; fi
    printf '%-34s exit %s, %s\n' "$1:" "$status" "$disk"
}

cat >nbd.conf <<END
[generic]
    unixsock = $folder/nbd.sock
[database]
    exportname = $folder/disk.img
END
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    serve nbdkit --foreground --unix "$folder/nbd.sock" "$lib/plugins/nbdkit-file-plugin.so" disk.img
    printf '%-34s %s\n' "nbdkit lists:" \
        "$(nbdinfo --list "nbd+unix:///?socket=$folder/nbd.sock" | grep '^export=')"
    copy 'nbdkit, nbdcopy to "databse"'
    serve nbdkit --foreground --unix "$folder/nbd.sock" --filter="$lib/filters/nbdkit-exportname-filter.so" \
        "$lib/plugins/nbdkit-file-plugin.so" disk.img exportname-strict=true exportname=database
    knows_database
    copy 'nbdkit, exportname-strict=true'
    serve qemu-nbd --persistent --format=raw --export-name=database --socket="$folder/nbd.sock" disk.img
    knows_database
    copy 'qemu-nbd, nbdcopy to "databse"'
    serve nbd-server --dont-fork --pid-file '' --config-file nbd.conf
    knows_database
    copy 'nbd-server, nbdcopy to "databse"'
} | tee seen

cat >expected <<'END'
nbdkit lists:                      export="":
nbdkit, nbdcopy to "databse":      exit 0, the disk has changed
nbdkit, exportname-strict=true:    exit 1, the disk is as it was
qemu-nbd, nbdcopy to "databse":    exit 1, the disk is as it was
nbd-server, nbdcopy to "databse":  exit 1, the disk is as it was
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
