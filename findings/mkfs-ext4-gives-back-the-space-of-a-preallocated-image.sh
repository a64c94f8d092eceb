#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      an image whose space was reserved with `fallocate --length` keeps that space when a file system is made in it. That is
#                      why one reserves it: the file system inside can never meet "no space left" outside.
# The real behaviour:  mkfs.ext4 discards all blocks first, also those of an ordinary file, where that punches a hole:
#                      nearly all of the reserved space is given back, without a message. mkfs.xfs and mkfs.btrfs
#                      discard block devices only, and leave the file as it is. `mkfs.ext4 -E nodiscard` does, too.
# What follows:        reserve the space of an image after mkfs.ext4, or use `-E nodiscard`.
# Version:             e2fsprogs 1.47.0-2+b2, xfsprogs 6.1.0-1, btrfs-progs 6.2-1+deb12u2, Debian 12, amd64. The temporary folder has to
#                      be on a file system that can punch holes (ext4, XFS, btrfs, tmpfs).
# Source:              run by this script; mke2fs(8) says of `-E discard` that it is the default.
# The output seen:
#     mkfs.ext4:              512 MiB reserved before, fewer than 64 after
#     mkfs.ext4 -E nodiscard: 512 MiB reserved before, 512 MiB after
#     mkfs.xfs:               512 MiB reserved before, 512 MiB after
#     mkfs.btrfs:             512 MiB reserved before, 512 MiB after
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    e2fsprogs=1.47.0-2+b2 xfsprogs=6.1.0-1 btrfs-progs=6.2-1+deb12u2 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/sbin:$folder/root/usr/bin:$folder/root/bin:$PATH"

mebibytes() { # of the space that the file takes
    echo $(($(stat --format='%b * %B' "$1") / 1048576))
}
try() { # COMMAND
    rm -f disk.img
    fallocate --length 512MiB disk.img
    local before after
    before=$(mebibytes disk.img)
    "$@" disk.img >mkfs.log 2>&1 || { cat mkfs.log; exit 1; }
    after=$(mebibytes disk.img)
    if [ "$after" -lt 64 ]; then after="fewer than 64"; else after="$after MiB"; fi
    local name="${1##*/} ${*:2}"
    name=${name/ -q/}
    name=${name% }:
    printf '%-23s %s MiB reserved before, %s after\n' "$name" "$before" "$after"
}
{
    try mkfs.ext4 -q
    try mkfs.ext4 -q -E nodiscard
    try mkfs.xfs -q
    try mkfs.btrfs -q
} | tee seen

cat >expected <<'END'
mkfs.ext4:              512 MiB reserved before, fewer than 64 after
mkfs.ext4 -E nodiscard: 512 MiB reserved before, 512 MiB after
mkfs.xfs:               512 MiB reserved before, 512 MiB after
mkfs.btrfs:             512 MiB reserved before, 512 MiB after
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
