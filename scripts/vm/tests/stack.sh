# SPDX-License-Identifier: Apache-2.0
# LVM over a clone and a cache, dm-crypt on a logical volume that is striped over both, xfs in it.
. ./common.sh
lvm_config='devices { use_devicesfile = 0 } activation { udev_sync = 0 udev_rules = 0 }'
attach /dev/nbd0 clone 4
attach /dev/nbd1 cache 4
for round in 1 2; do
    if [ "$round" = 1 ]; then
        pvcreate -q --config "$lvm_config" /dev/nbd0 /dev/nbd1
        vgcreate -q --config "$lvm_config" vg /dev/nbd0 /dev/nbd1
        lvcreate -q --config "$lvm_config" --yes --wipesignatures n --stripes 2 --size 384M --name lv vg
        echo passphrase >/tmp/key
        # Few iterations: the passphrase is no secret, and the processor may be emulated.
        cryptsetup luksFormat -q --pbkdf pbkdf2 --pbkdf-force-iterations 1000 /dev/vg/lv /tmp/key
    else
        vgchange -q --config "$lvm_config" --activate y vg
    fi
    cryptsetup open --allow-discards --key-file /tmp/key /dev/vg/lv secret
    [ "$round" = 2 ] || make_fs xfs /dev/mapper/secret
    mount /dev/mapper/secret /mnt
    if [ "$round" = 1 ]; then fill /mnt 8; fstrim -v /mnt; else verify /mnt; fi
    umount /mnt
    check_fs xfs /dev/mapper/secret
    cryptsetup close secret
    vgchange -q --config "$lvm_config" --activate n vg
    echo "round $round: LVM, dm-crypt and xfs on a clone and a cache"
done
nbd-client -d /dev/nbd0 >/dev/null
nbd-client -d /dev/nbd1 >/dev/null
