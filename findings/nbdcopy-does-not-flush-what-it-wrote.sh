#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      when nbdcopy has copied a file to an NBD server and ends with status 0, the server was asked to make the
#                      data durable, as `qemu-img convert` does at the end of the same copy.
# The real behaviour:  nbdcopy sends no FLUSH unless it is told to with `--flush`, although the server offers it. A
#                      power cut at the server after the successful end may lose all of the copy.
# What follows:        scripts that delete the original after nbdcopy need `--flush`, and so does a comparison of the two programs' speed.
# Version:             libnbd-bin 1.14.2-1, qemu-utils 1:7.2+dfsg-7+deb12u18+b3, nbdkit 1.32.5-1, Debian 12, amd64.
# Source:              run by this script; nbdcopy(1), "--flush".
# The output seen:
#     nbdcopy: exit 0, no FLUSH
#     nbdcopy --flush: exit 0, FLUSH
#     qemu-img convert -n -f raw -O raw: exit 0, FLUSH
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
    libnbd-bin=1.14.2-1 qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1 >apt.log 2>&1 ||
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


head -c 4M /dev/zero | tr '\0' 'x' >copied.img
run() {
    : >requests
    local status=0
    "$@" copied.img "$uri" >client.log 2>&1 || status=$?
    local sent="no FLUSH"
    if grep --text --quiet ' Flush id=' requests; then sent="FLUSH"; fi
    echo "$*: exit $status, $sent"
}
{
    run nbdcopy
    run nbdcopy --flush
    run qemu-img convert -n -f raw -O raw
} | tee seen

cat >expected <<'END'
nbdcopy: exit 0, no FLUSH
nbdcopy --flush: exit 0, FLUSH
qemu-img convert -n -f raw -O raw: exit 0, FLUSH
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
