# SPDX-License-Identifier: Apache-2.0
# This machine boots by itself from a clone of a qcow2 image that is far away (`scripts.boot_test`). It reads while the store and the server are
# away. The second time the disk is a local file, and nothing else is there any more.
. ./common.sh

say() { echo "$(cut -d' ' -f1 /proc/uptime) s after the kernel: $*"; }

until systemctl is-active -q multi-user.target; do sleep 0.2; done
. /etc/os-release
say "$PRETTY_NAME is up, its root is $(findmnt -no SOURCE,OPTIONS / | cut -c1-40)"
host up

# read_all NUMBER: of three parts of what Debian's packages have in /usr, all bytes, as the packages have them.
read_all() {
    cat /var/lib/dpkg/info/*.md5sums | grep -E ' usr/(bin|lib|sbin)/' | awk "NR % 3 == $1" >/run/sums
    (cd / && md5sum --quiet -c /run/sums) >/run/wrong 2>&1 || { cat /run/wrong; return 1; }
    wc -l </run/sums
}

if [ -e /var/sums ]; then
    sha256sum --quiet -c /var/sums
    say "what was written before is there; $(read_all 0) files of Debian are as its packages have them"
    systemctl poweroff --no-block
    exit 0
fi
head -c 16M /dev/urandom >/var/file
sha256sum /var/file >/var/sums
sync
# What was written and not flushed would be lost with a server that is killed, as with every disk; the file system is frozen meanwhile.
for what in store server; do
    fsfreeze -f /
    (read_all "$([ $what = store ] && echo 1 || echo 2)" >/run/nr) &
    reader=$!
    host "away $what"
    wait "$reader" || { fsfreeze -u /; exit 1; }
    fsfreeze -u /
    say "the $what is back: $(cat /run/nr) files were read meanwhile, none is wrong"
done
if dmesg | grep -i 'i/o error'; then exit 1; fi
say "the kernel has seen no error of its disk"
host hydrate
systemctl poweroff --no-block
