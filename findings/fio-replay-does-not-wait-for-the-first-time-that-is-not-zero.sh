#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      in a version 3 log of fio (`--write_iolog`, `--read_iolog`) each line begins with the time since the start, in
#                      microseconds. A replay carries out a request at that time: of two reads at 0 and at
#                      700000 the second waits for 0.7 s.
# The real behaviour:  a replay waits for the difference to the line before, but only if the time of the line before is not 0. So
#                      the first line whose time is not 0 is never waited for: both reads are carried out
#                      at once. With three reads at 0, 700000 and 1400000 the whole replay takes 0.7 s, not 1.4 s. If the
#                      first line says 1 instead of 0, the replay takes the time that the log says.
# What follows:        a program that writes such a log, or cuts off its head, should let its times begin at 1.
# Version:             fio 3.33-3, Debian 12, amd64.
# Source:              run by this script.
# The output seen:
#     reads at 0 and 0.7 s: no wait
#     reads at 0, 0.7 and 1.4 s: 0.7 s
#     reads at 0.000001 and 0.7 s: 0.7 s
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    fio=3.33-3 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
truncate -s 1M disk

replay() { # the times of the reads, in microseconds
    local offset=0 time
    {
        echo "fio version 3 iolog"
        echo "$1 $folder/disk add"
        echo "$1 $folder/disk open"
        for time in "$@"; do
            echo "$time $folder/disk read $offset 4096"
            offset=$((offset + 4096))
        done
        echo "$time $folder/disk close"
    } >log
    fio --name=replay --read_iolog=log --ioengine=psync --output-format=json --output=report >fio.log 2>&1
    python3 -c 'import json
text = open("report").read()
milliseconds = json.loads(text[text.index("{"):])["jobs"][0]["read"]["runtime"]
print("no wait" if milliseconds < 300 else f"{milliseconds / 1000:.1f} s")'
}
{
    echo "reads at 0 and 0.7 s: $(replay 0 700000)"
    echo "reads at 0, 0.7 and 1.4 s: $(replay 0 700000 1400000)"
    echo "reads at 0.000001 and 0.7 s: $(replay 1 700000)"
} | tee seen

cat >expected <<'END'
reads at 0 and 0.7 s: no wait
reads at 0, 0.7 and 1.4 s: 0.7 s
reads at 0.000001 and 0.7 s: 0.7 s
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
