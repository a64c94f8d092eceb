#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a journal makes ext4 safe against a power cut at any moment, also on a drive that writes 512 bytes in one piece: a write
#                      that is torn between two sectors is repaired by the journal at the next mount.
# The real behaviour:  the superblock is 1024 bytes, with its checksum in the second half. If only the first half of an
#                      update reaches the disk, the checksum is wrong. The journal cannot help, because the kernel looks at the superblock before it
#                      finds the journal: the mount fails. `e2fsck -n` finds the fault, and goes on with a backup of the superblock.
# What follows:        ext4 needs a drive that writes 1 KiB, in practice 4 KiB, in one piece. A test that tears writes at 512 bytes blames databases for
#                      what the file system does; and a rescue begins with `e2fsck`, although the disk was never bad.
# Version:             e2fsprogs 1.47.0-2+b2, Debian 12, amd64; the kernel is that of this machine (Linux 6.18 in the output).
# Source:              run by this script. The mount is tried by root only, where there are loop devices.
# The output seen:
#     whole update: dumpe2fs exit 0, superblock checksum is right
#     torn update: dumpe2fs says that the superblock checksum does not match
#     torn update: e2fsck uses a backup superblock
#     whole update: mount succeeds
#     torn update: mount fails
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root mountpoint
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    "e2fsprogs=1.47.0-2+b2" >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/sbin:$PATH"

truncate -s 64M before.img
mke2fs -q -t ext4 -F before.img
# An ordinary update of the superblock: another number of mounts.
cp before.img whole.img
tune2fs -C 5 whole.img >tune2fs.log
# The power goes when one of its two sectors has been written: bytes 1536 to 2047 are as before.
cp whole.img torn.img
dd if=before.img of=torn.img bs=512 skip=3 seek=3 count=1 conv=notrunc status=none

{
    status=0
    dumpe2fs -h whole.img >whole.log 2>&1 || status=$?
    grep -q 'checksum does not match' whole.log || echo "whole update: dumpe2fs exit $status, superblock checksum is right"
    dumpe2fs -h torn.img >torn.log 2>&1 || true
    ! grep -q 'Superblock checksum does not match' torn.log ||
        echo "torn update: dumpe2fs says that the superblock checksum does not match"
    e2fsck -n torn.img >fsck.log 2>&1 || true
    ! grep -q 'Superblock invalid, trying backup blocks' fsck.log || echo "torn update: e2fsck uses a backup superblock"
    for state in whole torn; do
        if [ "$(id -u)" -ne 0 ] || [ ! -e /dev/loop-control ]; then
            echo "$state update: mount is not tried: it takes root and loop devices"
        elif mount -o loop $state.img mountpoint 2>mount.log; then
            umount mountpoint
            echo "$state update: mount succeeds"
        else
            echo "$state update: mount fails"
        fi
    done
} | tee output

! grep -qE '^(torn.*succeeds|whole.*fails)' output && [ "$(wc -l <output)" -eq 5 ] || { echo "this has changed"; exit 1; }
