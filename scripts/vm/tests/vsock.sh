# SPDX-License-Identifier: Apache-2.0
# The installed package serves and clones over vsock. Server and clients are both in the machine (CID 1, by the module vsock_loopback).
. ./common.sh
modprobe vsock_loopback
install_package
cd /srv
mib=1048576
head -c $((48 * mib)) /dev/urandom >golden.img
truncate -s $((64 * mib)) golden.img mine.img theirs.img
cp golden.img disk.img
cat >disks.toml <<'TOML'
listen = ["vsock:any:10809", { address = "vsock:local:4000000000", tls = "require", tls_certificates = "/run/test" }]
control = "/srv/control.sock"
[device.disk]
table = "0 131072 linear /srv/disk.img 0"
access = ["ro vsock:1"]
[device.mine]
table = "0 131072 linear /srv/mine.img 0"
access = ["none vsock:3", "rw vsock"]
[device.theirs]
table = "0 131072 linear /srv/theirs.img 0"
access = ["rw vsock:3", "rw unix"]
TOML
uri=nbd+vsock://1:10809
tls_uri=nbds+vsock://1:4000000000
control="--control /srv/control.sock"

# The server, from now on process $server_pid.
serve() {
    nbdtarget serve --config disks.toml >>server.log 2>&1 &
    server_pid=$!
    until nbdinfo --size "$uri/disk" >/dev/null 2>&1; do kill -0 "$server_pid" || { cat server.log; return 1; }; sleep 0.1; done
}

# shown COMMAND...: as the command, and shows what it said if it fails.
shown() { "$@" >/tmp/shown.log 2>&1 || { cat /tmp/shown.log; return 1; }; }

# refused TEXT COMMAND...: the command fails and says TEXT.
refused() {
    local text=$1
    shift
    if "$@" >/tmp/refused.log 2>&1; then echo "was not refused: $*"; return 1; fi
    grep -q -- "$text" /tmp/refused.log || { cat /tmp/refused.log; return 1; }
}

refused 'cannot connect: connection refused' nbdtarget export "$uri/disk" --run true
serve

# libnbd's tools.
[ "$(nbdinfo --size "$uri/disk")" = $((64 * mib)) ]
nbdcopy golden.img "$uri/mine"
nbdcopy "$uri/mine" back.img
cmp golden.img back.img
cmp golden.img mine.img
rm back.img
echo "nbdcopy: 64 MiB there and back"

# Who may attach to what.
nbdinfo --list --no-content "$uri" >list
grep -q 'export="mine"' list && grep -q 'export="disk"' list
if grep -q theirs list; then cat list; exit 1; fi
[ "$(nbdinfo --json --no-content "$uri/disk" | grep -c '"is_read_only": true')" = 1 ]
refused theirs nbdinfo "$uri/theirs"
grep -q '(vsock:1): may not attach theirs' server.log || { cat server.log; exit 1; }
shown nbdtarget export -r "$uri/disk" --run "nbdtarget top -n 1 $control >clients; nbdtarget status $control >status"
grep -q 'vsock:1:' clients || { cat clients; exit 1; }
[ "$(grep -c linear status)" = 3 ]
echo "rules: the machine of this number sees its two exports, and one of them read-only"

# A clone as a client.
shown nbdtarget clone "$uri/disk" copy.img --exit-when-hydrated
cmp golden.img copy.img
rm copy.img*
shown nbdtarget clone "$tls_uri/disk?tls-certificates=/run/test" copy.img --exit-when-hydrated
cmp golden.img copy.img
rm copy.img*
refused 'TLS' nbdtarget clone "nbd+vsock://1:4000000000/disk" copy.img --exit-when-hydrated
echo "clone: a copy over vsock, and one with TLS"
