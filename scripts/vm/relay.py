# SPDX-License-Identifier: Apache-2.0
"""QEMU's user network starts this program for each connection of a guest to the host. It copies between that and a socket of the host.

    python -I relay.py SOCKET       a unix socket, or HOST:PORT; standard input is the connection

QEMU's end has Nagle's algorithm on, so a short write of the guest would wait for an acknowledgement: it gets it at once.
"""

import os
import socket
import sys
import threading

CHUNK = 1 << 18


def main() -> None:
    host, _, port = sys.argv[1].rpartition(":")
    up = socket.socket(socket.AF_INET if host else socket.AF_UNIX)
    down = socket.socket(fileno=0)
    down.setblocking(True)
    down.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        up.connect((host, int(port)) if host else port)
    except OSError:
        # The server is down: the guest sees that the connection is closed.
        os._exit(1)
    if host:
        up.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def copy(source: socket.socket, sink: socket.socket) -> None:
        try:
            while data := source.recv(CHUNK):
                if source is down:
                    down.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
                sink.sendall(data)
            sink.shutdown(socket.SHUT_WR)
        except OSError:
            # One end is gone, so the other one must go, too.
            os._exit(1)

    other = threading.Thread(target=copy, args=(up, down))
    other.start()
    copy(down, up)
    other.join()


if __name__ == "__main__":
    main()
