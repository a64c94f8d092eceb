# SPDX-License-Identifier: Apache-2.0
"""What QEMU's user network starts for each connection of a guest to the host: it copies between that and a unix socket.

    python -I relay.py SOCKET       standard input is the connection

QEMU's end has Nagle's algorithm on, so a short write of the guest would wait for an acknowledgement: it gets it at once.
"""

import os
import socket
import sys
import threading

CHUNK = 1 << 18


def main() -> None:
    up = socket.socket(socket.AF_UNIX)
    down = socket.socket(fileno=0)
    down.setblocking(True)
    down.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    try:
        up.connect(sys.argv[1])
    except OSError:
        # The server is down: the guest sees that the connection is closed.
        os._exit(1)

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
