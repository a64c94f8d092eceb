# SPDX-License-Identifier: Apache-2.0
"""The errors of the shell around the two packages without I/O.

    NbdTargetError
     +- ConstructorError    a table line is wrong; carries the kernel's own text
     +- TableError          a table, device or message verb cannot be carried out
     +- DeviceError         one I/O on one device failed
     +- ResolveError        a device cannot be opened: missing, in use, not ours, too small
     +- ListenError         an address cannot be listened on

Each `str()` is one line that names the thing and the reason, and shows no secret of a URL. An AssertionError is never a
user's fault: it is ours, and puts the mapped device that raised it into failure.
"""

import errno as errnos
import os

from nbdtarget.common.permissions import Permission
from nbdtarget.common.redaction import redacted

__all__ = [
    "ConstructorError",
    "DeviceError",
    "ListenError",
    "NbdTargetError",
    "ResolveError",
    "TableError",
]


class NbdTargetError(Exception):
    """Base of what the command line prints as one line, exit 1."""

    def lines(self) -> list[str]:
        """Return the lines to print: one, but for an error that is several mistakes at once."""
        return [str(self)]


class ConstructorError(NbdTargetError):
    """A target's constructor refused its arguments.

    Args:
        reason: the kernel's text where the kernel has one ("Region size is not a power of 2").
        errno: what the kernel's constructor returns, as a positive errno.
        target: the target type ("clone").
        allowed_by: what the user can give to have it all the same (`nbdtarget.common.permissions`).
        hint: what would be right, where the kernel's text does not say it; printed after the reason.
    """

    def __init__(
        self,
        reason: str,
        errno: int = errnos.EINVAL,
        target: str = "",
        allowed_by: Permission | None = None,
        hint: str = "",
    ) -> None:
        reason, hint = redacted(reason), redacted(hint)
        super().__init__(reason, errno, target, allowed_by, hint)
        self.reason = reason
        self.errno = errno
        self.target = target
        self.allowed_by = allowed_by
        self.hint = hint

    def __str__(self) -> str:
        parts = (self.target, self.reason, self.hint)
        return ": ".join(part for part in parts if part)


class TableError(NbdTargetError):
    """A device-mapper verb failed; `errno` is what the ioctl would have returned.

    Args:
        reason: the kernel's text where the kernel has one.
        outcome: what has become of the device, and what to do, if that is not plain.
        hint: what would be right, where the kernel's text does not say it; printed after the reason.
    """

    def __init__(
        self,
        reason: str,
        errno: int = errnos.EINVAL,
        outcome: str = "",
        hint: str = "",
    ) -> None:
        reason, hint = redacted(reason), redacted(hint)
        super().__init__(reason, errno, outcome, hint)
        self.reason = reason
        self.errno = errno
        self.outcome = outcome
        self.hint = hint

    def __str__(self) -> str:
        text = f"{self.reason}: {self.hint}" if self.hint else self.reason
        return f"{text} ({self.outcome})" if self.outcome else text


class DeviceError(NbdTargetError):
    """One I/O on a device failed. `errno` is positive."""

    def __init__(
        self, errno: int, device: str, op: str, offset: int, length: int
    ) -> None:
        super().__init__(errno, device, op, offset, length)
        self.errno = errno
        self.device = device
        self.op = op
        self.offset = offset
        self.length = length

    def __str__(self) -> str:
        return (
            f"{self.device}: {self.op} of {self.length} bytes at {self.offset}:"
            f" {os.strerror(self.errno)}"
        )


class ResolveError(NbdTargetError):
    """A device cannot be opened. `name` is what the user wrote, without the secrets of a URL."""

    def __init__(self, name: str, reason: str, errno: int = errnos.EINVAL) -> None:
        name = redacted(name)
        super().__init__(name, reason, errno)
        self.name = name
        self.reason = reason
        self.errno = errno

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class ListenError(NbdTargetError):
    """The server cannot listen on `address`, as the user wrote it."""

    def __init__(self, address: str, reason: str) -> None:
        super().__init__(address, reason)
        self.address = address
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.address}: {self.reason}"
