#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      fio with `--ioengine=nbd --fsync=4` fails when the server answers NBD_CMD_FLUSH with EIO, as it does
#                      with other engines when fsync fails; and `--fdatasync=4` does the same as `--fsync=4`, for NBD
#                      has one FLUSH only.
# The real behaviour:  the FLUSH is sent, its error is dropped: the job ends with error 0, the program exits with 0, and the syncs
#                      are counted as done. A failed WRITE, in contrast, ends the job. `--fdatasync` is
#                      not known to the engine: the job ends at the first sync with EINVAL, and no FLUSH is sent.
# What follows:        a durability test that uses fio's NBD engine cannot see a lost flush in its exit status. Look at
#                      the server's own counters, or flush with another client.
# Version:             fio 3.33-3, nbdkit 1.32.5-1, Debian 12, amd64.
# Source:              run by this script; fio's engines/nbd.c handles DDIR_SYNC but not DDIR_DATASYNC.
# The output seen:
#     --fsync=4: exit 0, job error 0, syncs counted 3, flushes refused 3
#     --fdatasync=4: exit 1, job error 22, syncs counted 0, flushes refused 0
#     failing writes: exit 1, job error 5
set -euo pipefail

folder=$(mktemp -d)
server=
cleanup() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
    fi
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    fio=3.33-3 nbdkit=1.32.5-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
plugin="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-eval-plugin.so"

nbdkit --foreground --unix "$folder/nbd.sock" "$plugin" \
    get_size='echo 1048576' can_write='exit 0' can_flush='exit 0' \
    pread='head -c $3 /dev/zero' \
    pwrite="cat >/dev/null; if [ -e $folder/no-writes ]; then echo EIO no writes >&2; exit 1; fi" \
    flush="echo refused >>$folder/flushes; echo EIO the disk is broken >&2; exit 1" 2>nbdkit.log &
server=$!
for _ in $(seq 100); do [ -S nbd.sock ] && break; sleep 0.1; done

run_fio() {
    local status=0
    : >flushes
    fio --name=job --ioengine=nbd --uri="nbd+unix:///?socket=$folder/nbd.sock" --rw=write --size=64k --bs=4k \
        "$@" --output-format=json --output=report >fio.log 2>&1 || status=$?
    echo "$status"
}
field() {
    python3 -c 'import json, sys
text = open("report").read()
job = json.loads(text[text.index("{"):])["jobs"][0]
for key in sys.argv[1:]: job = job[key]
print(job)' "$@"
}
for option in --fsync=4 --fdatasync=4; do
    status=$(run_fio "$option")
    echo "$option: exit $status, job error $(field error), syncs counted $(field sync total_ios)," \
        "flushes refused $(wc -l <flushes)"
done | tee seen
touch no-writes
status=$(run_fio)
echo "failing writes: exit $status, job error $(field error)" | tee -a seen

cat >expected <<'END'
--fsync=4: exit 0, job error 0, syncs counted 3, flushes refused 3
--fdatasync=4: exit 1, job error 22, syncs counted 0, flushes refused 0
failing writes: exit 1, job error 5
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
