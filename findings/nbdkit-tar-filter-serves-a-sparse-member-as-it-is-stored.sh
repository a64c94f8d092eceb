#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `nbdkit --filter=tar file disks.tar tar-entry=disk.img` serves the disk that `tar --extract` unpacks from the same archive.
#                      If the filter cannot do that for a member, it refuses the member.
# The real behaviour:  of a sparse member (`tar --sparse`), which is stored without its holes, the filter takes the real size from tar's listing,
#                      and serves as many bytes of the archive from the place where the member's data begins. So the disk is
#                      its data pushed together, then the headers and the data of the members that come after it; in the POSIX format it
#                      begins with the list of the pieces. Nothing is said, and nbdcopy exits with 0. Writes to the disk succeed, and
#                      destroy the next member.
# What follows:        a disk image is just what one packs with `--sparse`. Ask before you serve it: Python's tarfile tells it by
#                      TarInfo.issparse(). Unpack such a member, or pack it again without `--sparse`.
# Version:             nbdkit 1.32.5-1, libnbd-bin 1.14.2-1, tar 1.34+dfsg-1.2+deb12u1, Debian 12, amd64. The temporary folder has to be
#                      on a file system that has holes (ext4, XFS, btrfs, tmpfs).
# Source:              run by this script; nbdkit-tar-filter(1) does not speak of sparse members, and calculate_offset_of_entry() in
#                      filters/tar/tar.c (https://gitlab.com/nbdkit/nbdkit) has no case for them.
# The output seen:
#     not sparse: tar unpacks disk.img as it was
#     not sparse: read, nbdcopy exit 0: zeroes 1024 KiB, the disk's data 1024 KiB, zeroes 1024 KiB, the disk's data 1024 KiB
#     not sparse: written, nbdcopy exit 0, then next.img is as it was
#     sparse, GNU: tar unpacks disk.img as it was
#     sparse, GNU: read, nbdcopy exit 0: the disk's data 2048 KiB, other 0.5 KiB, data of next.img 2047.5 KiB
#     sparse, GNU: written, nbdcopy exit 0, then next.img is destroyed
#     sparse, POSIX: tar unpacks disk.img as it was
#     sparse, POSIX: read, nbdcopy exit 0: other 0.5 KiB, the disk's data 2048 KiB, other 1.5 KiB, data of next.img 2046 KiB
#     sparse, POSIX: written, nbdcopy exit 0, then next.img is destroyed
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
    nbdkit=1.32.5-1 libnbd-bin=1.14.2-1 tar=1.34+dfsg-1.2+deb12u1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$folder/root/bin:$PATH"
export TMPDIR="$folder" # The filter writes tar's listing there.
plugins="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins"
filters="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/filters"
uri="nbd+unix:///?socket=$folder/nbd.sock"

# A disk of 4 MiB with data at 1 and at 3 MiB, and another one without holes.
truncate --size 4M disk.img
for start in 1 3; do
    head -c 1M /dev/zero | tr '\0' 'D' | dd of=disk.img bs=1M seek="$start" conv=notrunc iflag=fullblock status=none
done
head -c 8M /dev/zero | tr '\0' 'N' >next.img
head -c 4M /dev/zero | tr '\0' 'W' >written.img

cat >look.py <<'END'
import itertools

NAMES = {0: "zeroes", ord("D"): "the disk's data", ord("N"): "data of next.img"}

with open("copy.img", "rb") as copy:
    blocks = [copy.read(512) for _ in range(8192)]
    rest = len(copy.read())
kinds = [NAMES.get(block[0], "other") if len(set(block)) == 1 else "other" for block in blocks]
print(", ".join(f"{name} {len(list(group)) / 2:g} KiB" for name, group in itertools.groupby(kinds)), end="")
print(f", {rest} bytes more" if rest else "")
END

serve() { # FUNCTION: calls it while the filter serves disk.img.
    nbdkit --foreground --unix "$folder/nbd.sock" --filter="$filters/nbdkit-tar-filter.so" \
        "$plugins/nbdkit-file-plugin.so" disks.tar tar-entry=disk.img 2>nbdkit.log &
    server=$!
    for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done
    "$1"
    stop_server
}
read_it() { nbdcopy "$uri" copy.img && echo "nbdcopy exit 0: $(python3 look.py)" || echo "nbdcopy exit $?"; }
write_it() { nbdcopy --flush written.img "$uri" && echo -n "nbdcopy exit 0" || echo -n "nbdcopy exit $?"; }
unpack() { # FILE
    mkdir unpacked
    tar --extract --file disks.tar --directory unpacked "$1" 2>tar.log || true
    if cmp --quiet "$1" "unpacked/$1"; then echo "as it was"; else echo "destroyed"; fi
    rm -rf unpacked
}
try() { # NAME OPTION...
    local name=$1
    shift
    tar --create --file disks.tar --mtime=@1700000000 --owner=0 --group=0 --numeric-owner "$@" disk.img next.img
    echo "$name: tar unpacks disk.img $(unpack disk.img)"
    echo "$name: read, $(serve read_it)"
    echo "$name: written, $(serve write_it), then next.img is $(unpack next.img)"
}
{
    trap stop_server EXIT
    try "not sparse" --format=gnu
    try "sparse, GNU" --format=gnu --sparse
    try "sparse, POSIX" --format=posix --sparse
} | tee seen

cat >expected <<'END'
not sparse: tar unpacks disk.img as it was
not sparse: read, nbdcopy exit 0: zeroes 1024 KiB, the disk's data 1024 KiB, zeroes 1024 KiB, the disk's data 1024 KiB
not sparse: written, nbdcopy exit 0, then next.img is as it was
sparse, GNU: tar unpacks disk.img as it was
sparse, GNU: read, nbdcopy exit 0: the disk's data 2048 KiB, other 0.5 KiB, data of next.img 2047.5 KiB
sparse, GNU: written, nbdcopy exit 0, then next.img is destroyed
sparse, POSIX: tar unpacks disk.img as it was
sparse, POSIX: read, nbdcopy exit 0: other 0.5 KiB, the disk's data 2048 KiB, other 1.5 KiB, data of next.img 2046 KiB
sparse, POSIX: written, nbdcopy exit 0, then next.img is destroyed
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
