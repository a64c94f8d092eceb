#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# The good guess:      when sendfile() has returned the number of bytes that it sent, those bytes are on their way: what is written
#                      to the file afterwards cannot change them, as with read() and send().
# The real behaviour:  the kernel sends references to the pages of the page cache. A write to the file that comes before
#                      the receiver has read is what the receiver gets, on TCP and on unix sockets. Here all of the 64 KiB are the
#                      later ones.
# What follows:        an NBD server that answers a READ with sendfile() (or asyncio's loop.sendfile) can send data of a WRITE that
#                      it carried out after the READ, or half of it: a checksum that the client keeps with its block does not
#                      match. A server has to copy, or to keep writes away until the client has received the reply.
# Version:             Linux 6.18 (the script tells which one runs), CPython 3.11 or later for the calls.
# Source:              run by this script; sendfile(2) has a note that asks callers to leave the file alone until then.
# The output seen:
#     unix socket, send:     65536 bytes sent, then overwritten: the receiver has 65536 old and 0 new
#     unix socket, sendfile: 65536 bytes sent, then overwritten: the receiver has 0 old and 65536 new
#     TCP, send:             65536 bytes sent, then overwritten: the receiver has 65536 old and 0 new
#     TCP, sendfile:         65536 bytes sent, then overwritten: the receiver has 0 old and 65536 new
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

cat >overwrite_what_was_sent.py <<'END'
import os
import socket
from collections.abc import Callable

LENGTH = 64 * 1024


def unix_pair() -> tuple[socket.socket, socket.socket]:
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)


def tcp_pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        receiver = socket.create_connection(listener.getsockname())
        sender, _ = listener.accept()
    return sender, receiver


def by_send(sender: socket.socket, file: int) -> int:
    return sender.send(os.pread(file, LENGTH, 0))


def by_sendfile(sender: socket.socket, file: int) -> int:
    return os.sendfile(sender.fileno(), file, 0, LENGTH)


def counted(
    pair: Callable[[], tuple[socket.socket, socket.socket]], send: Callable[[socket.socket, int], int]
) -> str:
    file = os.open("disk.img", os.O_RDWR | os.O_CREAT)
    os.pwrite(file, b"o" * LENGTH, 0)
    sender, receiver = pair()
    with sender, receiver:
        sent = send(sender, file)
        os.pwrite(file, b"n" * LENGTH, 0)
        got = receiver.recv(sent, socket.MSG_WAITALL)
    os.close(file)
    old, new = got.count(b"o"), got.count(b"n")
    return f"{sent} bytes sent, then overwritten: the receiver has {old} old and {new} new"


print("unix socket, send:    ", counted(unix_pair, by_send))
print("unix socket, sendfile:", counted(unix_pair, by_sendfile))
print("TCP, send:            ", counted(tcp_pair, by_send))
print("TCP, sendfile:        ", counted(tcp_pair, by_sendfile))
END
echo "Linux $(uname -r)"
python3 overwrite_what_was_sent.py | tee seen

cat >expected <<'END'
unix socket, send:     65536 bytes sent, then overwritten: the receiver has 65536 old and 0 new
unix socket, sendfile: 65536 bytes sent, then overwritten: the receiver has 0 old and 65536 new
TCP, send:             65536 bytes sent, then overwritten: the receiver has 65536 old and 0 new
TCP, sendfile:         65536 bytes sent, then overwritten: the receiver has 0 old and 65536 new
END
diff expected seen || { echo "the behaviour has changed"; exit 1; }
