#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `qemu-img create -f vpc disk.vhd 1G` makes a disk of 1 GiB, and a raw disk that is converted to vpc (VHD) and
#                      back has the length that it had, as with qcow2, vmdk, vdi and vhdx.
# The real behaviour:  the disk is longer: its size is rounded up to whole cylinders of the geometry in the VHD header, without a
#                      message. The converted disk ends with up to some hundred KiB of zeroes that the original did not have.
# What follows:        what stands at the end of a disk (the second header of GPT, md's superblock 1.0) is not at the end any more, and
#                      a copy of the disk may not fit where the original did. `-o force_size=on` keeps the size.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     104857600 bytes, longer after a round trip: vpc 8192 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
#     1073741824 bytes, longer after a round trip: vpc 253952 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
#     1000001536 bytes, longer after a round trip: vpc 192512 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"

{
    for size in 104857600 1073741824 1000001536; do
        qemu-img create -q -f vpc disk.vhd $size
        truncate --size $size disk.img
        longer=
        for format in vpc qcow2 vmdk vdi vhdx; do
            rm -f there back.img
            qemu-img convert -f raw -O $format disk.img there
            qemu-img convert -f $format -O raw there back.img
            longer+=" $format $(($(stat -c %s back.img) - size))"
        done
        qemu-img create -q -f vpc -o force_size=on disk.vhd $size
        made=$(qemu-img info --output=json disk.vhd | sed -n 's/.*"virtual-size": \([0-9]*\).*/\1/p')
        echo "$size bytes, longer after a round trip:$longer; force_size $((made - size))"
    done
} | tee seen

cat >expected <<'END'
104857600 bytes, longer after a round trip: vpc 8192 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
1073741824 bytes, longer after a round trip: vpc 253952 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
1000001536 bytes, longer after a round trip: vpc 192512 qcow2 0 vmdk 0 vdi 0 vhdx 0; force_size 0
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
