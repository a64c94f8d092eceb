# SPDX-License-Identifier: Apache-2.0
"""Device names that a helper opens: `qemu:`, `rbd:`, `nbdkit:` and `helper:`. What they say: `words.py`."""

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, ClassVar

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper.configured import helper_commands
from nbdtarget.devices.helper.words import (
    HelperName,
    absolute_nbdkit,
    absolute_qemu,
    absolute_rbd,
    parse_configured,
    parse_nbdkit,
    parse_qemu,
    parse_rbd_name,
)
from nbdtarget.devices.scheme import Scheme, scheme_of

if TYPE_CHECKING:
    from nbdtarget.devices.base import Device

__all__ = ["HelperScheme", "NbdkitScheme", "QemuScheme", "RbdScheme"]


class _HelpedScheme(Scheme):
    says_format: ClassVar[bool] = True
    starts_programs: ClassVar[bool] = True

    def is_read_only(self, name: str) -> bool:
        return True

    def parse(self, name: str) -> HelperName:
        """Raises: ResolveError."""
        raise NotImplementedError  # each of the three schemes says it

    async def open(self, name: str, *, read_only: bool) -> "Device":
        words = self.parse(name)
        from nbdtarget.devices.helper.device import open_helper

        return await open_helper(
            words, read_only=read_only, open_container=self._open_container
        )

    async def _open_container(self, name: str) -> "Device":
        """Raises: ResolveError."""
        raise NotImplementedError  # of the schemes that have containers

    def identity(self, name: str) -> Hashable:
        try:
            return self.parse(name).identity
        except ResolveError:
            return name


class QemuScheme(_HelpedScheme):
    name: ClassVar[str] = "qemu"
    syntax: ClassVar[str] = "qemu:FORMAT:IMAGE"
    summary: ClassVar[str] = (
        "an image in a format, or what else qemu-nbd opens, read-only"
    )
    programs: ClassVar[tuple[str, ...]] = ("qemu-nbd", "qemu-img")

    def __init__(self, containers: Mapping[str, Scheme]) -> None:
        """Args: containers: the schemes of files that are images and that we open, by name."""
        self._containers = containers

    async def _open_container(self, name: str) -> "Device":
        return await scheme_of(self._containers, name).open(name, read_only=True)

    def copy_sizes(self, name: str) -> tuple[int, int]:
        try:
            container = parse_qemu(name).container
        except ResolveError:
            container = ""
        if not container:
            return super().copy_sizes(name)
        return scheme_of(self._containers, container).copy_sizes(container)

    def parse(self, name: str) -> HelperName:
        return parse_qemu(name)

    def absolute(self, name: str, directory: str) -> str:
        return absolute_qemu(name, directory)

    def path(self, name: str) -> str | None:
        try:
            words = parse_qemu(name)
        except ResolveError:
            return None
        return words.what if words.is_path else None


class RbdScheme(_HelpedScheme):
    name: ClassVar[str] = "rbd"
    syntax: ClassVar[str] = "rbd:POOL/IMAGE[@SNAPSHOT]"
    summary: ClassVar[str] = "an RBD image of Ceph, read-only"
    programs: ClassVar[tuple[str, ...]] = ("qemu-nbd", "rbd")

    def parse(self, name: str) -> HelperName:
        return parse_rbd_name(name)

    def absolute(self, name: str, directory: str) -> str:
        return absolute_rbd(name, directory)


class NbdkitScheme(_HelpedScheme):
    name: ClassVar[str] = "nbdkit"
    syntax: ClassVar[str] = "nbdkit:PLUGIN?KEY=VALUE"
    summary: ClassVar[str] = "what a plugin of nbdkit opens, read-only"
    programs: ClassVar[tuple[str, ...]] = ("nbdkit",)

    def parse(self, name: str) -> HelperName:
        return parse_nbdkit(name)

    def absolute(self, name: str, directory: str) -> str:
        return absolute_nbdkit(name, directory)


class HelperScheme(_HelpedScheme):
    name: ClassVar[str] = "helper"
    syntax: ClassVar[str] = "helper:NAME"
    summary: ClassVar[str] = "what a command of the configuration file opens, read-only"

    def parse(self, name: str) -> HelperName:
        return parse_configured(name, helper_commands())
