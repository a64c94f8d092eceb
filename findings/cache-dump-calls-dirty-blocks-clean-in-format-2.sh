#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `cache_dump` (thin-provisioning-tools 0.9.0, the newest in Debian 12) prints which blocks of a dm-cache
#                      are dirty, in both of the kernel's metadata formats; `cache_restore --metadata-version 2` and
#                      `cache_dump` are each other's inverse.
# The real behaviour:  of metadata in format 2, where the dirty bits are a bitset of their own, it prints dirty="false" for every
#                      block, without a warning and with exit status 0. `cache_restore` does write the
#                      bits: metadata made from a dump with dirty blocks and from the same dump without any differ.
#                      `cache_check` says nothing. `cache_writeback` writes none of these blocks back, and exits with 0, too. Format 2
#                      is what LVM makes by default.
# What follows:        a dump that was made by this version must not be believed when it says that a block is clean: a user who
#                      restores it elsewhere and writes back only what is dirty loses what only the cache holds, and so does one who
#                      believes `cache_writeback` and throws the cache away.
# Version:             thin-provisioning-tools 0.9.0-2, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     format 1: restore exit 0, dump exit 0, check exit 0, dirty blocks in the dump: 2
#     format 2: restore exit 0, dump exit 0, check exit 0, dirty blocks in the dump: 0
#     format 1: writeback exit 0, bytes of the origin that were written: 131072
#     format 2: writeback exit 0, bytes of the origin that were written: 0
#     metadata made with and without dirty blocks differ in format 2: yes
set -euo pipefail

folder=$(mktemp -d)
cleanup() {
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    thin-provisioning-tools=0.9.0-2 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
cat >dirty.xml <<'END'
<superblock uuid="" block_size="128" nr_cache_blocks="64" policy="smq" hint_width="4">
  <mappings>
    <mapping cache_block="0" origin_block="5" dirty="true"/>
    <mapping cache_block="1" origin_block="6" dirty="false"/>
    <mapping cache_block="2" origin_block="9" dirty="true"/>
  </mappings>
  <hints>
    <hint cache_block="0" data="AAAAAA=="/>
    <hint cache_block="1" data="AAAAAA=="/>
    <hint cache_block="2" data="AAAAAA=="/>
  </hints>
</superblock>
END
sed 's/dirty="true"/dirty="false"/' dirty.xml >clean.xml

restore() { # VERSION XML METADATA
    truncate -s 4M "$3"
    cache_restore --quiet --metadata-version "$1" --input "$2" --output "$3"
}
{
    for version in 1 2; do
        restored=0 dumped=0 checked=0
        restore $version dirty.xml metadata.$version || restored=$?
        cache_dump metadata.$version >dump.$version || dumped=$?
        cache_check metadata.$version >check.log 2>&1 || checked=$?
        echo "format $version: restore exit $restored, dump exit $dumped, check exit $checked," \
            "dirty blocks in the dump: $(grep -c 'dirty="true"' dump.$version || true)"
    done
    for version in 1 2; do
        wrote=0
        rm -f origin cache
        truncate -s 4M origin
        head -c 4M /dev/zero | tr '\0' 'c' >cache
        cache_writeback --no-metadata-update --metadata-device metadata.$version \
            --origin-device origin --fast-device cache >writeback.log 2>&1 || wrote=$?
        echo "format $version: writeback exit $wrote, bytes of the origin that were written: $(tr -d '\0' <origin | wc -c)"
    done
    restore 2 clean.xml metadata.clean
    differs=yes
    cmp --quiet metadata.2 metadata.clean && differs=no
    echo "metadata made with and without dirty blocks differ in format 2: $differs"
} | tee seen

cat >expected <<'END'
format 1: restore exit 0, dump exit 0, check exit 0, dirty blocks in the dump: 2
format 2: restore exit 0, dump exit 0, check exit 0, dirty blocks in the dump: 0
format 1: writeback exit 0, bytes of the origin that were written: 131072
format 2: writeback exit 0, bytes of the origin that were written: 0
metadata made with and without dirty blocks differ in format 2: yes
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
