# SPDX-License-Identifier: Apache-2.0
# The power of a disk is cut under a mounted ext4. What fsync has promised is there afterwards, and the file system has no fault.
. ./common.sh
attach /dev/nbd0 powercut 1
make_fs ext4 /dev/nbd0
for seed in 1 2 3; do
    mount /dev/nbd0 /mnt
    [ ! -e /mnt/sums ] || verify /mnt
    mkdir -p "/mnt/$seed"
    fill /mnt 2
    # More that no flush covers.
    head -c 4M /dev/urandom >"/mnt/$seed/unflushed" || true
    host message powercut cut tear "$seed"
    # The disk is without power: what the file system still writes fails, as it would in a machine that is off.
    umount /mnt
    nbd-client -d /dev/nbd0 >/dev/null
    host message powercut on
    attach /dev/nbd0 powercut 1
    mount /dev/nbd0 /mnt
    verify /mnt
    umount /mnt
    check_fs ext4 /dev/nbd0
    echo "power cut with seed $seed: nothing that was synced is lost, and e2fsck finds no fault"
done
nbd-client -d /dev/nbd0 >/dev/null
