#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `qemu-img convert` exits with 0 only if the target has made the image durable: it flushes
#                      at the end, and a server that answers that FLUSH with EIO makes it fail.
# The real behaviour:  with the default cache mode (unsafe) and with `-t none` it exits with 0 and prints nothing, although
#                      the server has refused to flush. Only `-t writethrough`, which waits for each write to be
#                      durable, reports the error. `nbdcopy --flush` fails as one would expect.
# What follows:        an exit status of 0 says nothing about durability. A server that has lost writes must tell
#                      its operator by other means than the failed FLUSH.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, Debian 12, amd64.
# Source:              run by this script; the server is nbdkit's eval plugin, whose `flush` fails with EIO.
# The output seen:
#     convert                  exit 0
#     convert -t none          exit 0
#     convert -t writethrough  exit 1
#     nbdcopy --flush          exit 1
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
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-eval-plugin.so"

nbdkit --foreground --unix "$folder/nbd.sock" "$plugin" \
    get_size='echo 1048576' can_write='exit 0' can_flush='exit 0' \
    pread='head -c $3 /dev/zero' pwrite='cat >/dev/null' \
    flush='echo EIO the disk is broken >&2; exit 1' 2>nbdkit.log &
server=$!
for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done

head -c 1M /dev/urandom >image
uri="nbd+unix:///?socket=$folder/nbd.sock"
status_of() { local status=0; "$@" >/dev/null 2>&1 || status=$?; echo "exit $status"; }
{
    echo "convert                  $(status_of qemu-img convert -n -f raw -O raw image "$uri")"
    echo "convert -t none          $(status_of qemu-img convert -n -t none -f raw -O raw image "$uri")"
    echo "convert -t writethrough  $(status_of qemu-img convert -n -t writethrough -f raw -O raw image "$uri")"
    echo "nbdcopy --flush          $(status_of nbdcopy --flush image "$uri")"
} | tee seen

grep -q 'the disk is broken' nbdkit.log || { echo "the server was never asked to flush"; exit 1; }
cat >expected <<'END'
convert                  exit 0
convert -t none          exit 0
convert -t writethrough  exit 1
nbdcopy --flush          exit 1
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
