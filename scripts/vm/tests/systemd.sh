# SPDX-License-Identifier: Apache-2.0
# The units under a real systemd, over three boots of one machine. A clone is mounted by fstab through the kernel's client.
. ./common.sh
mounted='/dev/nbd0 /mnt ext4 _netdev,nofail,x-systemd.requires=nbd@nbd0.service 0 0'

# property NAME: of nbdtarget.service.
property() { systemctl show --value --property="$1" nbdtarget.service; }

# The first boot: install.
if [ ! -e /usr/bin/nbdtarget ]; then
    install_package
    truncate -s 256M /srv/golden.img
    mkfs.ext4 -q /srv/golden.img
    mount -o loop /srv/golden.img /mnt
    fill /mnt 8
    umount /mnt
    cat >/etc/nbdtarget/disks.toml <<'TOML'
listen = ["unix:/run/nbdtarget/nbd.sock"]
[device.web]
table = "0 524288 clone /srv/web.meta /srv/web.img /srv/golden.img 128 0 2 hydration_rate 1048576"
TOML
    truncate -s 256M /srv/web.img
    echo 'nbd0 /run/nbdtarget/nbd.sock web unix' >/etc/nbdtab
    echo nbd >/etc/modules-load.d/nbd.conf
    mkdir -p /etc/systemd/system/nbd@nbd0.service.d /var/log/journal
    cp /usr/share/doc/nbdtarget/examples/nbd@.service.d /etc/systemd/system/nbd@nbd0.service.d/nbdtarget.conf
    echo "$mounted" >>/etc/fstab
    systemctl daemon-reload
    systemctl enable -q nbdtarget.service
    echo "boot 1: installed $(nbdtarget --version)"
    systemctl --no-block poweroff
    exit 0
fi

until systemctl is-active --quiet mnt.mount; do
    systemctl is-failed --quiet nbdtarget.service nbd@nbd0.service mnt.mount && { journalctl --no-pager -b -u nbdtarget -u nbd@nbd0 -u mnt.mount; exit 1; }
    sleep 0.5
done
verify /mnt

# The second boot: everything is mounted. Reload, hand-over, crash of the client's peer.
if [ ! -e /mnt/second ]; then
    # The line is told every five seconds.
    until [[ $(property StatusText) == "web "*"% hydrated, 1 client" ]]; do sleep 0.5; done
    echo "boot 2: /mnt is mounted from $(findmnt -n -o SOURCE /mnt); $(property StatusText)"
    systemctl reload nbdtarget.service
    verify /mnt
    echo "reload: $(property ActiveState), $(property StatusText)"

    mkdir -p /etc/systemd/system/nbdtarget.service.d
    printf '[Service]\nExecReload=\nExecReload=nbdtarget upgrade --control /run/nbdtarget/control.sock\n' \
        >/etc/systemd/system/nbdtarget.service.d/upgrade.conf
    systemctl daemon-reload
    before=$(property MainPID)
    head -c 4M /dev/urandom >/mnt/second
    systemctl reload nbdtarget.service
    after=$(property MainPID)
    [ "$before" != "$after" ] && [ "$(property ActiveState)" = active ] && kill -0 "$after"
    (cd /mnt && sha256sum second >>sums)
    sync -f /mnt
    verify /mnt
    [ "$(property NRestarts)" = 0 ]
    echo "hand-over by reload: process $before, now $after; $(property StatusText)"

    # A silent server is noticed: its watchdog is fed by the process that took over.
    [ "$(property WatchdogUSec)" = 3min ] && [ "$(property WatchdogTimestampMonotonic)" -gt 0 ]

    # The units for one clone and one cache.
    mkdir -p /etc/nbdtarget/clone /etc/nbdtarget/cache
    truncate -s 64M /srv/origin.img
    printf 'SOURCE=/srv/golden.img\nDEST=/srv/copy.img\nOPTIONS=--no-hydration --hydrate-on-read\n' >/etc/nbdtarget/clone/copy
    printf 'ORIGIN=/srv/origin.img\nCACHE=/srv/fast.img\nOPTIONS=--cache-size 16M --mode writeback\n' >/etc/nbdtarget/cache/db
    systemctl start nbdtarget-clone@copy.service nbdtarget-cache@db.service
    [ "$(systemctl show --value --property=StatusText nbdtarget-clone@copy.service)" = 'copy 0 % hydrated, 0 clients' ]
    systemctl stop nbdtarget-clone@copy.service nbdtarget-cache@db.service
    [ "$(systemctl show --value --property=Result nbdtarget-clone@copy.service nbdtarget-cache@db.service | sort -u | tr -d '\n')" = success ]
    echo "units for a clone and a cache: started, and stopped in order"

    # The crash of a server. Debian 12's client does not connect again by itself, so the file system is mounted anew.
    systemctl kill --signal=KILL nbdtarget.service
    until [ "$(property NRestarts)" = 1 ] && [ "$(property ActiveState)" = active ]; do sleep 0.2; done
    umount -l /mnt
    systemctl stop nbd@nbd0.service || true
    systemctl reset-failed
    systemctl start mnt.mount
    verify /mnt
    echo "crash: started again ($(property StatusText)); mounted anew, and all that was synced is there"
    head -c 4M /dev/urandom >/mnt/third
    (cd /mnt && sha256sum third >>sums)
    # Not synced: the shutdown has to unmount while the server still runs.
    systemctl --no-block poweroff
    exit 0
fi

# The third boot: the shutdown has lost nothing, because it went in order.
dumpe2fs -h /dev/nbd0 2>/dev/null | grep 'Filesystem state' || true
shutdown=$(journalctl --no-pager -b -1 -o cat | grep -nE 'Unmounted (mnt.mount|/mnt)|Stopped (nbd@nbd0.service|NBD client)|(Stopping|Stopped) (nbdtarget.service|nbdtarget: disks)|Reached target shutdown' | tail -n 5)
echo "$shutdown"
order=$(echo "$shutdown" | sed -E 's/^[0-9]+://; s/Unmounted.*/unmounted/; s/Stopped (nbd@|NBD).*/disconnected/; s/Stopping nbdtarget.*/stopping/; s/Stopped nbdtarget.*/stopped/; s/Reached.*/down/' | tr '\n' ' ')
case $order in
*"unmounted disconnected stopping stopped"*) ;;
*) echo "the shutdown went in another order: $order"; journalctl --no-pager -b -1 -o short-monotonic | tail -n 60; exit 1 ;;
esac
if journalctl --no-pager -k -b | grep -q 'EXT4-fs (nbd0): recovery complete'; then
    echo 'ext4 had to recover: it was not unmounted in time'
    exit 1
fi
echo "boot 3: the shutdown unmounted, disconnected, then stopped the server; nothing is lost"

# The socket unit: it is open before the server is, and the first client starts the service.
umount /mnt
systemctl stop nbd@nbd0.service nbdtarget.service
sed -i '/^listen/d' /etc/nbdtarget/disks.toml
systemctl start nbdtarget.socket
for round in first second; do
    [ "$(property ActiveState)" = inactive ] && [ -S /run/nbdtarget/nbd.sock ]
    nbd-client -unix /run/nbdtarget/nbd.sock -N web /dev/nbd0 >/tmp/client.log 2>&1 || { cat /tmp/client.log; journalctl --no-pager -b -u nbdtarget; exit 1; }
    [ "$(property ActiveState)" = active ]
    mount /dev/nbd0 /mnt
    verify /mnt
    head -c 1M /dev/urandom >"/mnt/$round-socket"
    (cd /mnt && sha256sum "$round-socket" >>sums)
    umount /mnt
    nbd-client -d /dev/nbd0 >/dev/null
    systemctl stop nbdtarget.service 2>/dev/null
done
[ "$(systemctl show --value --property=ActiveState nbdtarget.socket)" = active ]
echo "socket: opened before the server, which the first client started, twice; the socket stayed"
systemctl stop nbdtarget.socket
# The script ends the machine itself, as in the boots before.
systemctl --no-block poweroff
