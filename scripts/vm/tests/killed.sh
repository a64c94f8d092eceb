# SPDX-License-Identifier: Apache-2.0
# The server is killed under a mounted file system that is written to, and started again. The client of Debian 12 does not bring the file system through that,
# with -persist or without it; but what was synced is there when the disk is attached anew, and the file system has no fault.
. ./common.sh
for options in "" "-nonetlink -persist"; do
    for export in clone cache; do
        nbd-client "$server" 10809 /dev/nbd0 -N "$export" $options >/tmp/nbd-client.log 2>&1
        make_fs ext4 /dev/nbd0
        mount /dev/nbd0 /mnt
        fill /mnt 8
        (while head -c 64K /dev/urandom >/mnt/block && sync /mnt/block; do :; done) 2>/dev/null &
        writer=$!
        host kill 1
        wait "$writer" || true # it has seen an error
        umount -l /mnt
        nbd-client -d /dev/nbd0 >/dev/null 2>&1 || true
        until attach /dev/nbd1 "$export" 1 >/dev/null 2>&1; do sleep 0.2; done
        # The journal is replayed by the mount.
        mount /dev/nbd1 /mnt
        verify /mnt
        umount /mnt
        check_fs ext4 /dev/nbd1
        nbd-client -d /dev/nbd1 >/dev/null
        echo "server killed under ext4 on $export, nbd-client $options: attached anew, what was synced is there, no fault"
    done
done
