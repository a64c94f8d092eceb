# SPDX-License-Identifier: Apache-2.0
# The server is replaced by a new process, over and over, under a mounted file system that is written to.
. ./common.sh
for export in clone cache; do
    attach /dev/nbd0 "$export" 4
    make_fs ext4 /dev/nbd0
    mount /dev/nbd0 /mnt
    fill /mnt 8
    (
        nr=0
        until [ -e /tmp/enough ]; do
            nr=$((nr + 1))
            echo "$nr" >/mnt/counter.new
            sync /mnt/counter.new
            mv /mnt/counter.new /mnt/counter
        done
    ) &
    writer=$!
    for _ in 1 2 3; do host upgrade; done
    touch /tmp/enough
    wait "$writer"
    rm /tmp/enough
    verify /mnt
    written=$(cat /mnt/counter)
    umount /mnt
    check_fs ext4 /dev/nbd0
    nbd-client -d /dev/nbd0 >/dev/null
    echo "3 hand-overs under ext4 on $export: $written synced writes, and no error"
done
