# SPDX-License-Identifier: Apache-2.0
"""`Scheme`: one kind of device names, for example `memory:SIZE` or `nbd://HOST/EXPORT`.

Theory of operation. A device name is a URI, whose scheme is what stands before the first colon, or a
path, which has none. `nbdtarget.devices.registry` lists the schemes, and `nbdtarget.devices.resolve`
hands each name to the scheme that it belongs to. A scheme answers four questions about a name:

    open       which device is it?
    identity   do two names mean the same disk?
    absolute   what is the name called from another directory?
    create     can a disk of that name be made? Only files can, unless a scheme says otherwise.

A scheme is light: the command line imports all of them for its help. So the module of the device
itself (`nbdtarget.devices.nbd.device` takes 50 ms to import) is imported inside `open`, and not at the top.

How to add a scheme: docs/extending.md.
"""

import re
from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar, Final

from nbdtarget.common.errors import ResolveError
from nbdtarget.common.named import alternatives

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["Scheme", "maybe_scheme", "scheme_of", "syntaxes"]

_SCHEME: Final = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")

COPY_BYTES: Final = 4 << 20
COPIES_BYTES: Final = 16 << 20


class Scheme:
    """One kind of device names. Subclasses implement `open`, and what else they need.

    Attributes:
        name: what stands before the colon, in lower case; empty for paths.
        syntax: how such a name is written, for help texts and errors.
        summary: what it means, for help texts; begins with a noun.
        is_volatile: what is stored is gone as soon as the device is closed.
        says_format: the name says in which format the disk is.
        starts_programs: to open the disk, another program is started.
        programs: those that are needed.
        modules: of Python, of an optional package, that are needed.
    """

    name: ClassVar[str]
    syntax: ClassVar[str]
    summary: ClassVar[str]
    is_volatile: ClassVar[bool] = False
    says_format: ClassVar[bool] = False
    starts_programs: ClassVar[bool] = False
    programs: ClassVar[tuple[str, ...]] = ()
    modules: ClassVar[tuple[str, ...]] = ()

    async def open(self, name: str, *, read_only: bool) -> "Device":
        """Open the disk called `name`, and lock it if other processes could use it.

        Raises: ResolveError: missing, not a disk, no permission, in use, ….
        """
        raise NotImplementedError

    def identity(self, name: str) -> Hashable:
        """Return a value that is equal for all names of one disk, and for no other disk.

        The disk may be open or not, and may be missing. This must not raise, block on a network, or
        open anything. By default, two names mean the same disk if they are spelled the same.
        """
        return name

    def absolute(self, name: str, directory: str) -> str:
        """Return `name` as it is called from anywhere, if it was meant as seen from `directory`.

        By default, a URI contains no relative path.
        """
        return name

    def may_start_programs(self, name: str) -> bool:
        """Whether opening `name` starts another program."""
        return self.starts_programs

    def path(self, name: str) -> str | None:
        """Return the path of the file or block device that `name` names; None if it names something else."""
        return None

    def is_read_only(self, name: str) -> bool:
        """Whether a device of this name can only be read."""
        return False

    def copy_sizes(self, name: str) -> tuple[int, int]:
        """Return how many bytes a background copy from the device should be for, and how many all of them together.

        The default is tuned for NBD servers behind a unix socket.
        """
        return COPY_BYTES, COPIES_BYTES

    def may_create(self, name: str) -> bool:
        """Whether there is no disk of this name, and `create` could make one."""
        return False

    async def create(self, name: str, size: int, *, sparse: bool) -> "Device":
        """Make a disk of `size` zero bytes and open it for writing. See `resolve.create_device`."""
        raise ResolveError(name, "only a file can be created")

    async def remove_created(self, name: str) -> None:
        """Remove what `create` made, after its device was closed."""
        raise AssertionError(f"{name} was not created")


def syntaxes(schemes: Mapping[str, Scheme]) -> str:
    """Return how device names are written, for help texts and errors."""
    return alternatives(scheme.syntax for scheme in schemes.values())


def maybe_scheme(schemes: Mapping[str, Scheme], name: str) -> Scheme | None:
    """Return that of the schemes, by name, which the device name belongs to."""
    return schemes.get(_scheme_name(name))


def scheme_of(schemes: Mapping[str, Scheme], name: str) -> Scheme:
    """As `maybe_scheme`. Raises: ResolveError: it belongs to none."""
    scheme = maybe_scheme(schemes, name)
    if scheme is None:
        raise ResolveError(
            name,
            f"{_scheme_name(name)}: is not supported; write {syntaxes(schemes)};"
            f" if it is a file, write ./{name}",
        )
    return scheme


def _scheme_name(name: str) -> str:
    """Return the scheme's name in lower case; empty for a path."""
    match = _SCHEME.match(name)
    return match[1].lower() if match else ""
