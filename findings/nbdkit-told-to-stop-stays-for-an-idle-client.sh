#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      a server that is told to stop with SIGTERM closes its idle connections, or ends soon: a client learns of
#                      it by the end of file and connects again to the next instance.
# The real behaviour:  nbdkit 1.32 neither closes an idle connection nor ends while one is open. It answers each further
#                      request on it with error 108 (NBD_ESHUTDOWN), for as long as the client likes to
#                      ask; new connections are not accepted. It ends when the client closes.
# What follows:        a client that waits for the end of file before it connects again waits for ever, and keeps the old server from ending.
#                      Error 108 has to mean: close this connection and connect again. And a supervisor must close
#                      its own connections first, or follow SIGTERM by SIGKILL.
# Version:             nbdkit 1.32.5-1, Debian 12, amd64.
# Source:              run by this script; the NBD protocol, "NBD_ESHUTDOWN".
# The output seen:
#     a read before SIGTERM: error 0
#     2 s after SIGTERM, a read: error 108, the server runs
#     another read: error 108, the server runs
#     after the client has closed: the server has ended
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

# Unpack the pinned packages, and those that they need and that this machine lacks, into the folder.
mkdir -p debs/partial root
apt-get install --yes --download-only --reinstall --no-install-recommends -qq \
    -o Debug::NoLocking=1 -o Dir::Cache::archives="$folder/debs" -o APT::Sandbox::User=root \
    nbdkit=1.32.5-1 >apt.log 2>&1 ||
    { cat apt.log; echo "cannot download the pinned packages"; exit 1; }
for package in debs/*.deb; do dpkg-deb --extract "$package" root; done
export LD_LIBRARY_PATH="$folder/root/usr/lib/x86_64-linux-gnu:$folder/root/lib/x86_64-linux-gnu"
export PATH="$folder/root/usr/sbin:$folder/root/usr/bin:$PATH"
cat >stop_it.py <<'END'
import os
import signal
import socket
import struct
import subprocess
import time

path = os.path.abspath("nbd.sock")
server = subprocess.Popen(["nbdkit", "--foreground", "--unix", path, os.environ["PLUGIN"], "1M"])
try:
    while not os.path.exists(path):
        time.sleep(0.05)
    client = socket.socket(socket.AF_UNIX)
    client.connect(path)
    client.recv(18)  # the greeting
    client.sendall(struct.pack(">I", 3) + b"IHAVEOPT" + struct.pack(">II", 1, 0))
    client.recv(10)  # size and flags

    def read() -> str:
        client.sendall(struct.pack(">IHHQQI", 0x25609513, 0, 0, 1, 0, 512))
        answer = client.recv(4096)
        return f"error {struct.unpack('>IIQ', answer[:16])[1]}" if answer else "end of file"

    def server_state() -> str:
        return "the server runs" if server.poll() is None else "the server has ended"

    print(f"a read before SIGTERM: {read()}")
    server.send_signal(signal.SIGTERM)
    time.sleep(2)
    print(f"2 s after SIGTERM, a read: {read()}, {server_state()}")
    time.sleep(1)
    print(f"another read: {read()}, {server_state()}")
    client.close()
    for _ in range(50):
        if server.poll() is not None:
            break
        time.sleep(0.1)
    print(f"after the client has closed: {server_state()}")
finally:
    server.kill()
    server.wait()
END
export PLUGIN="$folder/root/usr/lib/x86_64-linux-gnu/nbdkit/plugins/nbdkit-memory-plugin.so"
python3 stop_it.py 2>nbdkit.log | tee seen

cat >expected <<'END'
a read before SIGTERM: error 0
2 s after SIGTERM, a read: error 108, the server runs
another read: error 108, the server runs
after the client has closed: the server has ended
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
