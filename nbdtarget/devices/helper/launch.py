# SPDX-License-Identifier: Apache-2.0
"""Become a program that ends with its parent, and that may have a listening socket and bounds.

    python -I -S launch.py PARENT SOCKET CPU_S MEMORY_BYTES PROGRAM ARGUMENT…

This runs as a process of its own, between fork and exec, where the server itself may run no Python code. It imports nothing of
this package. PARENT is the parent's pid: the kernel kills this process when that one ends, also by SIGKILL. SOCKET is a
descriptor, which becomes number 3, as systemd passes it (sd_listen_fds), or -1. LISTEN_PID must be the pid of the program itself:
with another one, or none, qemu-nbd and nbdkit do not look at the socket and listen on TCP port 10809. A bound of 0 is none.
"""

import ctypes
import os
import resource
import sys

__all__ = ["main"]

PR_SET_PDEATHSIG = 1
SIGKILL = 9  # the module `signal` takes as long to import as Python to start, and a start of a helper passes here twice
FIRST_SOCKET = 3  # SD_LISTEN_FDS_START
CANNOT_RUN = 127  # as a shell says it


def main(argv: list[str]) -> int:
    parent, sock, cpu_s, memory = map(int, argv[:4])
    command = argv[4:]
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, SIGKILL, 0, 0, 0)
    if os.getppid() != parent:
        return CANNOT_RUN  # it ended before the kernel was told
    if cpu_s:
        resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s))
    if memory:
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith(("LISTEN_", "WATCHDOG_")) and key != "NOTIFY_SOCKET"
    }
    if sock >= 0:
        os.dup2(sock, FIRST_SOCKET, inheritable=True)
        if sock != FIRST_SOCKET:
            os.close(sock)
        environment |= {"LISTEN_FDS": "1", "LISTEN_PID": str(os.getpid())}
    try:
        os.execvpe(command[0], command, environment)
    except OSError as error:
        print(f"cannot be started: {error.strerror}", file=sys.stderr)
    return CANNOT_RUN


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
