# SPDX-License-Identifier: Apache-2.0
# The kernel's client over TCP, with four connections in plain text, and with one in TLS, which is nbd-client's matter, in user space: it passes on
# what the kernel sends. The server is away for a second while nothing is mounted.
. ./common.sh
tls="-cacertfile ca-cert.pem -tlshostname localhost"
for export in clone cache; do
    nbd-client "$server" 10809 /dev/nbd0 -N "$export" -C 4 >/tmp/nbd-client.log 2>&1
    make_fs ext4 /dev/nbd0
    mount /dev/nbd0 /mnt
    fill /mnt 8
    umount /mnt
    check_fs ext4 /dev/nbd0
    nbd-client -d /dev/nbd0 >/dev/null
    host kill 1
    until nbd-client "$server" 10809 /dev/nbd1 -N "$export" $tls >/tmp/nbd-client.log 2>&1; do sleep 0.2; done
    mount /dev/nbd1 /mnt
    verify /mnt
    rm /mnt/file* /mnt/sums
    fill /mnt 8
    umount /mnt
    check_fs ext4 /dev/nbd1
    nbd-client -d /dev/nbd1 >/dev/null
    echo "ext4 on $export over TCP, then in TLS: what was written is there, no fault"
done
