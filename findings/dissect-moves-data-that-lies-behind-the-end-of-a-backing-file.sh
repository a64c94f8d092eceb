#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      dissect.hypervisor reads a qcow2 overlay as QEMU does. An overlay may be longer than its backing file: that is how a disk is
#                      made from a cloud image (`qemu-img create -b base.img -F raw -f qcow2 disk.qcow2 40G`). What the overlay does not have,
#                      and what lies behind the end of the backing file, reads as zeroes.
# The real behaviour:  the read of such a part from the backing file gives fewer bytes or none, and the rest is not filled up. A longer read
#                      is then too short, and all that follows the gap stands too early in it: data of the overlay appears at offsets
#                      where the disk has zeroes. A copy in pieces (shutil.copyfileobj) takes the first empty piece for
#                      the end, and loses what comes after it. No exception is raised; `size` is right.
# What follows:        compare the length of what was read with what was asked for, and fill each short piece with zeroes up to a cluster. Better,
#                      let `qemu-img convert` make a raw image first. Code that reads through a chain has to know each layer's length.
# Version:             dissect.hypervisor 3.21, CPython 3.11; the images are made by qemu-utils 1:7.2+dfsg-7+deb12u18+b3, Debian 12, amd64.
# Source:              run by this script; QCow2Stream._read() in dissect/hypervisor/disk/qcow2.py
#                      (https://github.com/fox-it/dissect.hypervisor) appends what backing_file.read() returns, as it is. The description of the
#                      format (https://www.qemu.org/docs/master/interop/qcow2.html, "Cluster mapping") says that zeroes shall be read there.
# The output seen:
#     raw base of 4 MiB, overlay of 4: qemu-img bbob; dissect size 4, read at once bbob, copied in pieces bbob
#     raw base of 4 MiB, overlay of 10: qemu-img bbob....o.; dissect size 10, read at once bbobo, copied in pieces bbob
#     qcow2 base of 4 MiB, overlay of 10: qemu-img bbob....o.; dissect size 10, read at once bbobo, copied in pieces bbob
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check --no-compile dissect.hypervisor==3.21

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

cat >show.py <<'END'
import io
import pathlib
import shutil
import sys

from dissect.hypervisor.disk import qcow2

MIB = 1 << 20


def picture(data: bytes) -> str:
    """One sign for each MiB: its letter, a point for zeroes, a question mark for a mixture."""
    parts = [data[start : start + MIB] for start in range(0, len(data), MIB)]
    return "".join("?" if len(set(part)) > 1 else chr(part[0] or ord(".")) for part in parts)


file = sys.argv[1]
if file.endswith(".raw"):
    print(f"qemu-img {picture(pathlib.Path(file).read_bytes())}")
else:
    image = qcow2.QCow2(pathlib.Path(file))
    whole = image.open().read(image.size)
    stream, copied = image.open(), io.BytesIO()
    shutil.copyfileobj(stream, copied, 1 << 16)
    print(f"dissect size {image.size // MIB}, read at once {picture(whole)}, copied in pieces {picture(copied.getvalue())}")
END

# A base of 4 MiB with the letter b, and overlays that have the letter o in MiB 2 and in the last MiB but one.
head -c 4M /dev/zero | tr '\0' 'b' >base.img
tool qemu-img convert -f raw -O qcow2 base.img base.qcow2
try() { # BASE FORMAT MIB
    tool qemu-img create -q -f qcow2 -b "$1" -F "$2" overlay.qcow2 "$3M"
    tool qemu-io -f qcow2 -c "write -P 0x6f 2M 1M" -c "write -P 0x6f $(($3 - 2))M 1M" overlay.qcow2 >qemu-io.log
    tool qemu-img convert -f qcow2 -O raw overlay.qcow2 overlay.raw
    echo "$2 base of 4 MiB, overlay of $3: $(venv/bin/python show.py overlay.raw); $(venv/bin/python show.py overlay.qcow2)"
    rm overlay.*
}
{
    try base.img raw 4
    try base.img raw 10
    try base.qcow2 qcow2 10
} | tee seen

cat >expected <<'END'
raw base of 4 MiB, overlay of 4: qemu-img bbob; dissect size 4, read at once bbob, copied in pieces bbob
raw base of 4 MiB, overlay of 10: qemu-img bbob....o.; dissect size 10, read at once bbobo, copied in pieces bbob
qcow2 base of 4 MiB, overlay of 10: qemu-img bbob....o.; dissect size 10, read at once bbobo, copied in pieces bbob
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
