#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      `loop.add_reader` is level-triggered on every event loop: as long as a socket has unread bytes, or an
#                      error or an end of file that nothing has fetched, the callback is called again. So a
#                      callback may read a little at a time, and it will meet the error in the end.
# The real behaviour:  on uvloop, once the peer has reset a unix socket (it closed it with bytes of ours unread), the callback is
#                      called once and never again: neither for the bytes that are still there, nor for the error.
#                      asyncio's own loop goes on calling: the rest of the bytes, the error, then the end of file.
# What follows:        a server on uvloop must receive until it gets EAGAIN, the error or the end of file in each callback, or look for
#                      dead peers by other means; else it keeps the connection, and what that holds, for ever.
# Version:             uvloop 0.23.0, CPython 3.11 or later, Linux.
# Source:              run by this script.
# The output seen:
#     asyncio: 4 bytes, 4 bytes, ConnectionResetError, end of file
#     uvloop: 4 bytes, then silence although 4 bytes and the error are waiting
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/python -m pip install --quiet --disable-pip-version-check uvloop==0.23.0

cat >meet_the_error.py <<'END'
import asyncio
import socket

import uvloop


async def what_a_reader_sees() -> list[str]:
    loop = asyncio.get_running_loop()
    ours, peers = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    ours.setblocking(False)
    seen: list[str] = []

    def readable() -> None:
        try:
            got = ours.recv(4)
        except ConnectionResetError as error:
            seen.append(type(error).__name__)
            return
        seen.append(f"{len(got)} bytes" if got else "end of file")
        if not got:
            loop.remove_reader(ours)

    ours.send(b"the peer never reads this, so its close is a reset")
    loop.add_reader(ours, readable)
    peers.send(b"12345678")
    peers.close()
    await asyncio.sleep(1)
    if "end of file" not in seen:
        loop.remove_reader(ours)
        left = len(ours.recv(100))
        try:
            ours.recv(100)
        except ConnectionResetError:
            seen.append(f"then silence although {left} bytes and the error are waiting")
    ours.close()
    return seen


for name, factory in ("asyncio", asyncio.new_event_loop), ("uvloop", uvloop.new_event_loop):
    with asyncio.Runner(loop_factory=factory) as runner:
        print(f"{name}: {', '.join(runner.run(what_a_reader_sees()))}")
END
venv/bin/python meet_the_error.py | tee seen

cat >expected <<'END'
asyncio: 4 bytes, 4 bytes, ConnectionResetError, end of file
uvloop: 4 bytes, then silence although 4 bytes and the error are waiting
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
