# SPDX-License-Identifier: Apache-2.0
# ext4, xfs and btrfs on a clone, a cache and a powercut, with one connection of the kernel's client and with four.
. ./common.sh
nr=0
for export in clone cache powercut; do
    for type in ext4 xfs btrfs; do
        nr=$((nr + 1))
        connections=$((nr % 2 == 0 ? 4 : 1))
        begun=$SECONDS
        attach /dev/nbd0 "$export" "$connections"
        make_fs "$type" /dev/nbd0
        mount "/dev/nbd0" /mnt
        fill /mnt 4
        head -c 8M /dev/urandom >/mnt/gone
        sync -f /mnt
        rm /mnt/gone
        # A powercut offers no discards.
        trimmed=untrimmed
        [ "$export" = powercut ] || trimmed=$(fstrim -v /mnt | sed 's/.*(\(.*\)) trimmed/trimmed \1/')
        umount /mnt
        # All that umount has written was flushed: a power cut takes none of it.
        [ "$export" != powercut ] || host message powercut cycle drop
        check_fs "$type" /dev/nbd0
        mount "/dev/nbd0" /mnt
        verify /mnt
        umount /mnt
        nbd-client -d /dev/nbd0 >/dev/null
        echo "$type on $export, $connections connection(s): made, filled, $trimmed, checked, verified in $((SECONDS - begun)) s"
    done
done
