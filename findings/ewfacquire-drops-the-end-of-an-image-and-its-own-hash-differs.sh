#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `ewfacquire` puts all bytes of a raw image into an EWF (E01) file, and `ewfexport` gives them back; the MD5 hash in the
#                      file is that of what the file holds. So what ends with SUCCESS also passes `ewfverify`.
# The real behaviour:  if the image does not end at a whole sector of 512 bytes, EWF cannot say so: the end of the
#                      image is not in the disk that is given back. But the hash was made over all bytes. ewfacquire
#                      says SUCCESS, `ewfexport` says SUCCESS with less, and `ewfverify` says FAILURE for an intact file.
# What follows:        pad a raw image to whole sectors before it is put into an EWF file (`truncate --size=%512`), and run `ewfverify`
#                      before the original is given away.
# Version:             ewf-tools 20140813-1+b1, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     1000000 bytes: ewfacquire exit 0, ewfexport exit 0 with 999936 bytes, ewfverify exit 1
#     the hash in the file is that of all 1000000 bytes
#     1000448 bytes: ewfacquire exit 0, ewfexport exit 0 with 1000448 bytes, ewfverify exit 0
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    ewf-tools=20140813-1+b1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/bin:$PATH"

try() { # FILE
    local acquired=0 exported=0 verified=0
    ewfacquire -q -u -t packed "$1" >log 2>&1 || acquired=$?
    ewfexport -q -u -f raw -t back packed.E01 >log 2>&1 || exported=$?
    ewfverify -q packed.E01 >log 2>&1 || verified=$?
    echo "$(stat -c %s "$1") bytes: ewfacquire exit $acquired," \
        "ewfexport exit $exported with $(stat -c %s back.raw) bytes, ewfverify exit $verified"
}
head -c 1000000 /dev/urandom >ragged.img
cp ragged.img padded.img
truncate --size=%512 padded.img
{
    try ragged.img
    if ewfinfo packed.E01 | grep --quiet "$(md5sum <ragged.img | cut -d ' ' -f 1)"; then
        echo "the hash in the file is that of all $(stat -c %s ragged.img) bytes"
    fi
    rm -f packed.* back.*
    try padded.img
} | tee seen

cat >expected <<'END'
1000000 bytes: ewfacquire exit 0, ewfexport exit 0 with 999936 bytes, ewfverify exit 1
the hash in the file is that of all 1000000 bytes
1000448 bytes: ewfacquire exit 0, ewfexport exit 0 with 1000448 bytes, ewfverify exit 0
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
