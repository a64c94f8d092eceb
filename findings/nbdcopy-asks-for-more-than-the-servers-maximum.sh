#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      nbdcopy asks for pieces that the server takes: a server tells its maximum block size in the handshake
#                      (NBD_INFO_BLOCK_SIZE), libnbd asks for it, and the specification says that a client must not ask for more.
# The real behaviour:  nbdcopy reads and writes 256 KiB at a time all the same. A server whose maximum is 64 KiB refuses, and the copy fails with
#                      "Invalid argument", in both directions. `qemu-img convert` asks for what is allowed.
# What follows:        give `--request-size` that maximum (`nbdinfo` prints it as block_size_maximum). A server that wants to be copied by nbdcopy
#                      without options has to take 256 KiB.
# Version:             libnbd-bin 1.14.2-1, with nbdkit 1.32.5-1 as the server and qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     maximum 64 KiB: nbdinfo shows 65536; read: nbdcopy exit 1, with --request-size exit 0, qemu-img exit 0
#     maximum 64 KiB: write: nbdcopy exit 1, with --request-size exit 0, qemu-img exit 0
#     maximum 256 KiB: nbdinfo shows 262144; read: nbdcopy exit 0, with --request-size exit 0, qemu-img exit 0
#     maximum 256 KiB: write: nbdcopy exit 0, with --request-size exit 0, qemu-img exit 0
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
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
lib="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit"

head -c 4M /dev/urandom >image
cp image served
uri="nbd+unix:///?socket=$folder/nbd.sock"
status_of() { local status=0; "$@" >>client.log 2>&1 || status=$?; echo "exit $status"; }
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    for kib in 64 256; do
        nbdkit --foreground --unix "$folder/nbd.sock" "--filter=$lib/filters/nbdkit-blocksize-policy-filter.so" \
            "$lib/plugins/nbdkit-file-plugin.so" served blocksize-minimum=1 blocksize-preferred=4096 \
            blocksize-maximum=${kib}K blocksize-error-policy=error 2>>nbdkit.log &
        server=$!
        for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
        shown=$(nbdinfo "$uri" | sed -n 's/.*block_size_maximum: *\([0-9]*\).*/\1/p')
        echo "maximum $kib KiB: nbdinfo shows $shown; read: nbdcopy $(status_of nbdcopy "$uri" copy)," \
            "with --request-size $(status_of nbdcopy --request-size=65536 "$uri" copy)," \
            "qemu-img $(status_of qemu-img convert -f raw -O raw "$uri" copy)"
        cmp image copy
        echo "maximum $kib KiB: write: nbdcopy $(status_of nbdcopy image "$uri")," \
            "with --request-size $(status_of nbdcopy --request-size=65536 image "$uri")," \
            "qemu-img $(status_of qemu-img convert -n -f raw -O raw image "$uri")"
        stop_server
    done
} | tee seen

cat >expected <<'END'
maximum 64 KiB: nbdinfo shows 65536; read: nbdcopy exit 1, with --request-size exit 0, qemu-img exit 0
maximum 64 KiB: write: nbdcopy exit 1, with --request-size exit 0, qemu-img exit 0
maximum 256 KiB: nbdinfo shows 262144; read: nbdcopy exit 0, with --request-size exit 0, qemu-img exit 0
maximum 256 KiB: write: nbdcopy exit 0, with --request-size exit 0, qemu-img exit 0
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
