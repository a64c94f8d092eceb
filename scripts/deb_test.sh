# SPDX-License-Identifier: Apache-2.0
# Runs as root in a clean Debian: installs the package, uses it, updates it, removes it and purges it.
#   deb_test.sh OLD.deb NEW.deb
set -euo pipefail
trap 'echo "failed in line $LINENO: $BASH_COMMAND"' ERR
old=$1
new=$2
say() { echo "   $*"; }

files_before=$(mktemp)
list() { find / -xdev \( -path /proc -o -path /dev -o -path /sys -o -path /tmp -o -path /var/lib/dpkg -o -path /var/log -o -path /run \) -prune -o -print | sort; }
list >"$files_before"

dpkg -i "$old" >/tmp/dpkg.log || { cat /tmp/dpkg.log; exit 1; }
dpkg --verify nbdtarget
version=$(nbdtarget --version)
[[ $version == *"fast path: compiled" ]]
say "installed: $version"
for page in man1/nbdtarget-clone.1 man5/nbdtarget.toml.5 man7/nbdtarget-tables.7; do [ -s "/usr/share/man/$page.gz" ] || { ls /usr/share/man/man7; exit 1; }; done
bash -c 'source /usr/share/bash-completion/completions/nbdtarget; complete -p nbdtarget' >/dev/null
nbdtarget doctor /srv >/tmp/doctor.log
say "doctor: $(grep -c '^  +' /tmp/doctor.log) of $(grep -cE '^  [-+!]' /tmp/doctor.log) things are there"
# Directories of the caller and PYTHONPATH do not get in the way.
mkdir /tmp/evil && echo 'raise SystemExit("evil")' >/tmp/evil/msgspec.py
(cd /tmp/evil && PYTHONPATH=/tmp/evil nbdtarget --version >/dev/null)
systemd-analyze verify --man=no /lib/systemd/system/nbdtarget.service /lib/systemd/system/nbdtarget.socket

cp /usr/share/doc/nbdtarget/examples/disks.toml /etc/nbdtarget/disks.toml
truncate -s 1G /srv/disk.img
start() {
    nbdtarget serve --config /etc/nbdtarget/disks.toml --state /var/lib/nbdtarget >/tmp/serve.log 2>&1 &
    server=$!
    until nbdtarget status disk >/dev/null 2>&1; do
        kill -0 "$server" || { cat /tmp/serve.log; exit 1; }
        sleep 0.1
    done
}
start
truncate -s 1M /srv/kept.img
nbdtarget create kept --persist --table '0 2048 linear /srv/kept.img 0'
say "the example serves: $(nbdtarget ls | tr '\n' ' ')"

# The server runs on during an update, and then hands over to the new version.
dpkg -i "$new" >/tmp/dpkg.log || { cat /tmp/dpkg.log; exit 1; }
nbdtarget upgrade >/tmp/upgrade.log
wait "$server"
say "updated to $(dpkg-query -W -f='${Version}' nbdtarget), $(cat /tmp/upgrade.log)"
nbdtarget status kept >/dev/null
kill "$(sed 's/process \([0-9]*\).*/\1/' /tmp/upgrade.log)"
while nbdtarget status kept >/dev/null 2>&1; do sleep 0.1; done

dpkg -r nbdtarget >/tmp/dpkg.log
[ ! -e /usr/bin/nbdtarget ]
dpkg -P nbdtarget >>/tmp/dpkg.log
left=$(list | comm -13 "$files_before" - | tr '\n' ' ')
say "after a purge there is more than before: $left"
[ "$left" = '/etc/nbdtarget /etc/nbdtarget/disks.toml /srv/disk.img /srv/kept.img /var/lib/nbdtarget /var/lib/nbdtarget/devices.toml /var/lib/nbdtarget/lock ' ]
