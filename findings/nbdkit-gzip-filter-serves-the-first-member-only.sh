#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `nbdkit --filter=gzip file disk.gz` serves the disk that `zcat disk.gz` prints. RFC 1952 says that a gzip file is a
#                      series of members whose contents belong together; bgzip makes such files, and so does everyone who
#                      appends to one.
# The real behaviour:  the filter serves the first member as if it were the whole disk. The rest is missing without an error
#                      or a message, and a copy of the disk succeeds. The filter for xz does read several streams.
# What follows:        compare the size that is served with the size of the disk before you trust a copy: with bgzip the first member is 64 KiB.
#                      `gzip --list` does not help, because it shows the size of the last member.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     one member: nbdcopy exit 0, 2097152 of 2097152 bytes
#     two members: nbdcopy exit 0, 1048576 of 2097152 bytes
#     two streams of xz: nbdcopy exit 0, 2097152 of 2097152 bytes
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
lib="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit"

head -c 1M /dev/urandom >first
head -c 1M /dev/urandom >second
cat first second >disk
gzip -c disk >one.gz
{ gzip -c first; gzip -c second; } >two.gz
{ xz -0 -c first; xz -0 -c second; } >two.xz
zcat two.gz | cmp - disk
xzcat two.xz | cmp - disk

try() { # NAME FILTER FILE
    local status=0
    rm -f copy
    # shellcheck disable=SC2016  # nbdkit sets $uri
    nbdkit --unix - "--filter=$lib/filters/nbdkit-$2-filter.so" "$lib/plugins/nbdkit-file-plugin.so" "$3" \
        --run 'nbdcopy "$uri" copy' || status=$?
    cmp --quiet --bytes "$(stat -c %s copy)" copy disk || { echo "other data than that of the disk"; exit 1; }
    echo "$1: nbdcopy exit $status, $(stat -c %s copy) of $(stat -c %s disk) bytes"
}
{
    try "one member" gzip one.gz
    try "two members" gzip two.gz
    try "two streams of xz" xz two.xz
} | tee seen

cat >expected <<'END'
one member: nbdcopy exit 0, 2097152 of 2097152 bytes
two members: nbdcopy exit 0, 1048576 of 2097152 bytes
two streams of xz: nbdcopy exit 0, 2097152 of 2097152 bytes
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
