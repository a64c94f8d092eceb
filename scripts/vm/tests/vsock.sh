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

# A copy that goes on while both servers, its own and that of its source, are replaced by new processes, and then are killed.
copy_uri=nbd+vsock://1:10811/copy
copy_control="--control /srv/copy.control"
# start_copy: serve the copy over vsock and a unix socket, from now on as process $copy_pid.
start_copy() {
    nbdtarget clone "$uri/disk" copy.img --hydration-rate 100K --exit-when-hydrated \
        --listen vsock:any:10811 --listen unix:/srv/copy.sock $copy_control >>copy.log 2>&1 &
    copy_pid=$!
    until nbdinfo --size "$copy_uri" >/dev/null 2>&1; do kill -0 "$copy_pid" || { cat copy.log; return 1; }; sleep 0.1; done
}
# hydrated: how many regions of the copy are there.
hydrated() { nbdtarget status copy --line $copy_control | awk '{ split($7, regions, "/"); print regions[1] }'; }
# goes_on: wait until more regions are there than now.
goes_on() {
    local before
    before=$(hydrated)
    until [ "$(hydrated)" -gt "$before" ]; do kill -0 "$copy_pid" || { cat copy.log; return 1; }; done
}
# replace OPTION...: replace a server by a new process, and print the number of that.
replace() { nbdtarget upgrade --json "$@" | sed -nE 's/.*"pid": *([0-9]+).*/\1/p'; }
# kill_server PID: kill a server, and wait until its sockets are free.
kill_server() {
    kill -KILL "$1"
    while kill -0 "$1" 2>/dev/null; do sleep 0.1; done
}
# readers: the connections of the copy, as the server of its source shows them.
readers() { nbdtarget top -n 1 $control | sed -nE 's/^(vsock:1:[0-9]+ on disk \(vsock:1\)),.*/\1/p' | sort; }
# write_and_flush MIB: one MiB there, which is not copied yet, by the kernel's client.
write_and_flush() {
    head -c 1M /dev/urandom >new.img
    dd if=new.img of=expected.img bs=1M "seek=$1" conv=notrunc status=none
    nbd-client -unix /srv/copy.sock -N copy /dev/nbd0 >nbd-client.log 2>&1 || { cat nbd-client.log; return 1; }
    dd if=new.img of=/dev/nbd0 bs=1M "seek=$1" oflag=direct conv=fsync status=none
    nbd-client -d /dev/nbd0 >/dev/null
}

cp golden.img expected.img
start_copy
goes_on
write_and_flush 40

# The processes are replaced, and the connections stay.
readers >before
grep -q vsock before || { nbdtarget top -n 1 $control; exit 1; }
server_heir=$(replace $control)
wait "$server_pid"
goes_on
readers >after
diff before after
shown nbdinfo --size "$uri/disk"
copy_heir=$(replace $copy_control)
wait "$copy_pid"
copy_pid=$copy_heir
goes_on
[ "$(nbdinfo --size "$copy_uri")" = $((64 * mib)) ]
echo "clone: both servers were replaced while it copied, and its $(wc -l <before) connections over vsock stayed"

# The processes are killed.
kill_server "$server_heir"
serve
goes_on
# What is copied before a flush is recorded by it.
synced=$(hydrated)
write_and_flush 44
kill_server "$copy_heir"
start_copy
[ "$(hydrated)" -ge "$synced" ] || { echo "$(hydrated) regions after the crash, but $synced were there before the flush"; exit 1; }
nbdcopy "$copy_uri" back.img
cmp expected.img back.img
[ "$(hydrated)" -lt 1024 ]
echo "clone: both servers were killed, and what a client reads is right; $(hydrated) of 1024 regions are copied"
nbdtarget message copy 0 hydration_rate 0 $copy_control
wait "$copy_pid"
cmp expected.img copy.img
cmp golden.img disk.img
kill "$server_pid"
wait "$server_pid"
echo "clone: the copy is whole, byte for byte"
