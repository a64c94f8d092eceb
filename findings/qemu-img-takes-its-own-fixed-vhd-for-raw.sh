#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `qemu-img info` and `qemu-img convert` without `-f` recognise the images that qemu-img itself has made: a VHD
#                      (vpc) is one, whether it is dynamic or of a fixed size, which is how Azure wants it.
# The real behaviour:  a VHD of a fixed size is said to be raw, and its footer of 512 bytes is counted as part of the disk. `convert`
#                      copies the footer along, and exits with 0: the copy is a sector too long. With `-f vpc` all is well.
#                      The mark of this subformat stands at the end of the file only, and the probe looks at the beginning.
# What follows:        a copy that was made without `-f` ends with a sector that no disk had: the second header of GPT is not in the last
#                      sector any more. "Raw" from `qemu-img info` says only that no other format was seen.
# Version:             qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     vpc, dynamic: info says vpc, 33554432 bytes; converted without -f: the disk
#     vpc, fixed: info says raw, 33554944 bytes; converted without -f: the disk, and 512 bytes more, which begin with conectix
#     vpc, fixed, and -f vpc: info says vpc, 33554432 bytes; converted with -f: the disk
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

size=$((32 << 20))
head -c 100000 /dev/zero | tr '\0' 'd' >disk.img
truncate --size $size disk.img

look() { # NAME FILE [-f FORMAT]
    local name=$1 file=$2 given="converted without -f" said
    shift 2
    [ $# = 0 ] || given="converted with -f"
    said=$(qemu-img info --output=json "$@" "$file" |
        sed -n 's/.*"virtual-size": \([0-9]*\).*/\1 bytes/p; s/.*"format": "\(.*\)".*/\1/p' | sort --reverse | paste -sd,)
    qemu-img convert "$@" -O raw "$file" back.img
    cmp --quiet --bytes $size back.img disk.img || { echo "the disk itself has changed"; exit 1; }
    local more=$(($(stat -c %s back.img) - size)) result="the disk"
    if [ $more -gt 0 ]; then
        result+=", and $more bytes more, which begin with $(tail -c $more back.img | head -c 8)"
    fi
    echo "$name: info says ${said//,/, }; $given: $result"
}
{
    for subformat in dynamic fixed; do
        qemu-img convert -f raw -O vpc -o subformat=$subformat,force_size=on disk.img $subformat.vhd
        look "vpc, $subformat" $subformat.vhd
    done
    look "vpc, fixed, and -f vpc" fixed.vhd -f vpc
} | tee seen

cat >expected <<'END'
vpc, dynamic: info says vpc, 33554432 bytes; converted without -f: the disk
vpc, fixed: info says raw, 33554944 bytes; converted without -f: the disk, and 512 bytes more, which begin with conectix
vpc, fixed, and -f vpc: info says vpc, 33554432 bytes; converted with -f: the disk
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
