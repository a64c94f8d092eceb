# SPDX-License-Identifier: Apache-2.0
"""`has_terminal`: whether this process has a terminal, so that the SIGHUP of a closed terminal can be told from one that was sent on purpose."""

import os

__all__ = ["has_terminal"]


def has_terminal() -> bool:
    """Whether there is a controlling terminal. When it is closed, the kernel takes it away from all its processes, and then sends SIGHUP."""
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC))
    except OSError:
        return False
    return True
