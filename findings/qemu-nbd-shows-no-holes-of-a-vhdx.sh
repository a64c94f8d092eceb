#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      qemu-nbd tells its clients by block status where an image has nothing, for a vhdx as for qcow2, vmdk and
#                      vdi: all four are sparse files that know which of their blocks are there.
# The real behaviour:  the whole of a vhdx is said to be data, also the blocks that the image does not have. A client that
#                      skips holes reads, and nbdcopy to a file system without looking for zeroes writes, all of it.
# What follows:        a tool that is to keep a copied vhdx sparse has to look for zeroes itself.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, libnbd-bin 1.14.2-1, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     qcow2: 65536 bytes are data, 1073676288 bytes are hole,zero
#     vmdk: 65536 bytes are data, 1073676288 bytes are hole,zero
#     vdi: 1048576 bytes are data, 1072693248 bytes are hole,zero
#     vhdx: 1073741824 bytes are data
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
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"

truncate --size 1G disk.img
printf 'some data' | dd of=disk.img conv=notrunc status=none
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    for format in qcow2 vmdk vdi vhdx; do
        qemu-img convert -f raw -O $format disk.img disk.$format
        qemu-nbd --read-only --persistent --format=$format --socket="$folder/nbd.sock" disk.$format 2>qemu-nbd.log &
        server=$!
        for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
        echo "$format:" \
            "$(nbdinfo --map --totals "nbd+unix:///?socket=$folder/nbd.sock" | awk '{print $1 " bytes are " $4 $5}' | paste -sd, | sed 's/,/, /')"
        stop_server
    done
} | tee seen

cat >expected <<'END'
qcow2: 65536 bytes are data, 1073676288 bytes are hole,zero
vmdk: 65536 bytes are data, 1073676288 bytes are hole,zero
vdi: 1048576 bytes are data, 1072693248 bytes are hole,zero
vhdx: 1073741824 bytes are data
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
