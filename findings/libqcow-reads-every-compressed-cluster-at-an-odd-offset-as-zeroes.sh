#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      pyqcow (libqcow-python) reads the images that `qemu-img convert -c` makes, as cloud images are. It has read compressed
#                      clusters for years, and it raises an exception for what it does not know (zstd, for example).
# The real behaviour:  in an image of version 3, which QEMU makes by default, each compressed cluster whose data begins at an odd byte of the
#                      file is read as zeroes, without an exception. That is about every second one. Bit 0 of an L2 entry means "all zeroes" for
#                      ordinary clusters only; for compressed ones it is part of the offset, which need not be aligned. This version, which
#                      is the first to know that bit, looks at it in both. Images of version 2 are read rightly.
# What follows:        do not read compressed images by this version. The one before it, 20240308, reads them rightly, but takes other bytes of the
#                      file for a cluster with the "all zeroes" bit. What was hashed or copied with either should be compared with what
#                      `qemu-img convert` gives. A test of a reader of qcow2 needs compressed clusters at odd offsets.
# Version:             libqcow-python 20260703, CPython 3.11; the images are made by qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script; sparse_flag_bit_mask in libqcow/libqcow_file.c (https://github.com/libyal/libqcow), and
#                      "Cluster mapping" in the description of the format (https://www.qemu.org/docs/master/interop/qcow2.html).
# The output seen:
#     plain: qemu-img compare says that it is the disk
#     plain: clusters not compressed are read: right
#     version3: qemu-img compare says that it is the disk
#     version3: clusters compressed, at even offsets are read: right
#     version3: clusters compressed, at odd offsets are read: zeroes
#     version2: qemu-img compare says that it is the disk
#     version2: clusters compressed, at even offsets are read: right
#     version2: clusters compressed, at odd offsets are read: right
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --no-compile libqcow-python==20260703

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    qemu-utils=1:7.2+dfsg-7+deb12u18+b3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
tool() { # NAME ARGUMENT...
    LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu" "$folder/root/usr/bin/$1" "${@:2}"
}

cat >compare.py <<'END'
import struct
import sys

import pyqcow

CLUSTER = 1 << 16
COMPRESSED = 1 << 62

name, file, disk = sys.argv[1], sys.argv[2], open("disk.img", "rb").read()
with open(file, "rb") as raw:
    raw.seek(40)
    raw.seek(struct.unpack(">Q", raw.read(8))[0])  # the L1 table
    raw.seek(struct.unpack(">Q", raw.read(8))[0] & 0x00FFFFFFFFFFFE00)  # the L2 table of the first 512 MiB
    entries = struct.unpack(f">{len(disk) // CLUSTER}Q", raw.read(8 * len(disk) // CLUSTER))
image = pyqcow.file()
image.open(file)
results: dict[str, set[str]] = {}
for index, entry in enumerate(entries):
    start = index * CLUSTER
    seen, right = image.read_buffer_at_offset(CLUSTER, start), disk[start : start + CLUSTER]
    kind = f"compressed, at {'odd' if entry & 1 else 'even'} offsets" if entry & COMPRESSED else "not compressed"
    result = "right" if seen == right else "zeroes" if seen == bytes(CLUSTER) else "wrong"
    results.setdefault(kind, set()).add(result)
for kind, found in sorted(results.items()):
    print(f"{name}: clusters {kind} are read: {', '.join(sorted(found))}")
END

# 64 clusters of numbered lines, each of which is compressed to another length.
seq -f '%.0f is a number' 250000 >disk.img
truncate --size 4M disk.img
tool qemu-img convert -f raw -O qcow2 disk.img plain.qcow2
tool qemu-img convert -f raw -O qcow2 -c disk.img version3.qcow2
tool qemu-img convert -f raw -O qcow2 -c -o compat=0.10 disk.img version2.qcow2
{
    for image in plain version3 version2; do
        tool qemu-img compare -q -f raw -F qcow2 disk.img "$image.qcow2" && echo "$image: qemu-img compare says that it is the disk"
        venv/bin/python compare.py "$image" "$image.qcow2"
    done
} | tee seen

cat >expected <<'END'
plain: qemu-img compare says that it is the disk
plain: clusters not compressed are read: right
version3: qemu-img compare says that it is the disk
version3: clusters compressed, at even offsets are read: right
version3: clusters compressed, at odd offsets are read: zeroes
version2: qemu-img compare says that it is the disk
version2: clusters compressed, at even offsets are read: right
version2: clusters compressed, at odd offsets are read: right
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
