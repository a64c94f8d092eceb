# SPDX-License-Identifier: Apache-2.0
"""Exports: how devices are named on the wire, and what is promised about them.

`ExportDirectory` is what the server asks of the owner of the devices; the server knows nothing of mapped
devices. `DirectoryExports` shows a directory to the handshake of one client: what that may attach.
"""

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Final, Protocol

from nbdtarget.common.access import Access, AccessRules, Identity
from nbdtarget.devices.base import Device
from nbdtarget.server.block_status import context_names
from nbdtarget_protocol.consts import (
    FLAG_CAN_MULTI_CONN,
    FLAG_READ_ONLY,
    FLAG_ROTATIONAL,
    FLAG_SEND_CACHE,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_FLUSH,
    FLAG_SEND_FUA,
    FLAG_SEND_TRIM,
    FLAG_SEND_WRITE_ZEROES,
    PAYLOAD_MAX_DEFAULT,
    REP_ERR_POLICY,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
)
from nbdtarget_protocol.errors import OptionError
from nbdtarget_protocol.handshake import ExportInfo

__all__ = [
    "DirectoryExports",
    "ExportDirectory",
    "preferred_block_size",
    "transmission_flags",
]

log = logging.getLogger(__name__)

PREFERRED_MIN: Final = 4096
PREFERRED_MAX: Final = 32 << 20  # what every client may send


class ExportDirectory(Protocol):
    """The devices that can be attached, by export name. All on the event loop's thread."""

    def names(self) -> Iterable[tuple[str, str]]:
        """Return (name, description) of each export, for LIST."""
        ...

    def listed(self, device: Device) -> tuple[str, str]:
        """Return (name, description) of the export that is `device`, as `names` does."""
        ...

    def claimed_names(self) -> Iterable[str]:
        """Return the name of each export, of those that cannot be served now, too."""
        ...

    def maybe_get(self, name: str) -> Device | None:
        """Return the device of that name."""
        ...

    def why_missing(self, name: str) -> str:
        """Return why that export cannot be served now, as a sentence; "": there is no such export."""
        ...

    def acquire(self, name: str) -> Device:
        """As `maybe_get`, and count one more opener. Raises: KeyError: there is no such device any more."""
        ...

    def release(self, device: Device) -> None:
        """Count one opener less. None of its bios is in flight any more."""
        ...


def transmission_flags(device: Device, *, read_only: bool = False) -> int:
    """Return the transmission flags of `device`; SEND_DF is the handshake's to add.

    CAN_MULTI_CONN is always set: no connection caches anything, every bio goes to the one
    device, and a FLUSH covers every write that has ended, on whichever connection. WRITE_ZEROES
    is always set, too: a device without a way to zero writes zeroes.
    """
    flags = FLAG_SEND_FLUSH | FLAG_SEND_FUA | FLAG_CAN_MULTI_CONN | FLAG_SEND_CACHE
    if device.is_rotational:
        flags |= FLAG_ROTATIONAL
    if device.read_only or read_only:
        return flags | FLAG_READ_ONLY
    flags |= FLAG_SEND_WRITE_ZEROES
    if device.can_discard:
        flags |= FLAG_SEND_TRIM
    if device.can_fast_zero:
        flags |= FLAG_SEND_FAST_ZERO
    return flags


def preferred_block_size(device: Device, *, payload_max: int) -> int:
    """Return the block size that a client should use, in bytes; a power of two.

    For example, a write that is smaller than a clone's region makes the clone read the rest of the region from its
    source. The minimum block size that is advertised stays 1, because every request is carried out.
    """
    limits = device.limits
    suits = limits.io_opt & -limits.io_opt  # for example, one chunk of three stripes
    upper = min(payload_max, PREFERRED_MAX)
    upper = 1 << upper.bit_length() - 1
    return min(max(suits, limits.logical_block_size, PREFERRED_MIN), upper)


class DirectoryExports:
    """A directory as `nbdtarget_protocol.handshake.Exports`.

    Args:
        payload_max: bytes of one READ or WRITE that the server takes. No more is advertised, and no more than 32 MiB,
            which clients assume without being told.
        rules: what the client may attach; without them, everything.
        why_full: returns why no further client may attach to a device; "": it may.
        peer: how the log names the client.
        asks_for_certificates: the listener verifies certificates. An export without rules exists only for clients that have shown one.
        refused: called with the reason and a line for the log, see `Refusals`.

    Attributes:
        client: what is known of the client. TLS adds to it.
    """

    def __init__(
        self,
        directory: ExportDirectory,
        *,
        payload_max: int = PAYLOAD_MAX_DEFAULT,
        rules: AccessRules | None = None,
        client: Identity | None = None,
        peer: str = "",
        why_full: Callable[[Device], str] = lambda _: "",
        asks_for_certificates: bool = False,
        refused: Callable[[str, str], None] = lambda _, line: log.warning("%s", line),
    ) -> None:
        self.directory = directory
        self._why_full = why_full
        self.client = client or Identity()
        self._payload_max = min(payload_max, PAYLOAD_MAX_DEFAULT)
        self._rules = rules or AccessRules()
        self._peer = peer
        self._asks_for_certificates = asks_for_certificates
        self._note_refusal = refused
        self._refused: set[str] = set()  # each is logged once

    def encrypted(self, version: str, names: tuple[str, ...]) -> None:
        """The client has shown in TLS who it is; `names`: those of its verified certificate."""
        self.client = replace(self.client, is_encrypted=True, names=names)
        log.info("%s: %s (%s)", self._peer, version, self.client)

    def names(self) -> Iterable[tuple[str, str]]:
        for name, description in self.directory.names():
            if self._rights(name) is not Access.NONE:
                yield name, description

    def lookup(self, name: str) -> ExportInfo | None:
        name = name or self._default()
        found = self._lookup(name) if name else None
        if found is None and self._is_unknown:
            # The same for exports that exist and for others: only a certificate tells whether there is one for this client.
            raise OptionError(REP_ERR_TLS_REQD, "a certificate is asked for: use TLS")
        return found

    def _default(self) -> str:
        """Return the name of the only export that the client may attach, which "" means; "": there is none, or there are several.

        One that cannot be served now counts: a client must not get another disk in its place. Exports that the client may
        not attach do not count, or "" would tell of them.
        """
        names = list(self.directory.claimed_names())
        found = [name for name in names if self._rights(name) is not Access.NONE]
        if names and not found:
            self._note_once("", "the default export")
        return found[0] if len(found) == 1 else ""

    @property
    def _is_unknown(self) -> bool:
        """Whether the client could still show a certificate that is asked for. After TLS it has shown one."""
        return self._asks_for_certificates and not self.client.is_encrypted

    def _rights(self, name: str) -> Access:
        """Return the rights of the client on an export, whether it exists or not."""
        if self._is_unknown and self._rules.of(name) is None:
            return Access.NONE
        return self._rules.access(name, self.client)

    def _lookup(self, name: str) -> ExportInfo | None:
        device = self.directory.maybe_get(name)
        if device is None:
            reason = self.directory.why_missing(name)
            if reason and self._access(name) is not Access.NONE:
                raise OptionError(REP_ERR_UNKNOWN, reason)
            return None
        # INFO_NAME tells the name that it is listed by, also if the client has asked for the default export, "".
        name, description = self.directory.listed(device)
        access = self._access(name)
        if access is Access.NONE:
            return None
        if reason := self._why_full(device):
            raise OptionError(REP_ERR_POLICY, reason)
        return ExportInfo(
            name=name,
            size=device.size,
            flags=transmission_flags(device, read_only=access is Access.READ),
            description=description,
            block_size_preferred=preferred_block_size(
                device, payload_max=self._payload_max
            ),
            payload_max=self._payload_max,
            contexts=context_names(device),
        )

    def _access(self, name: str) -> Access:
        """Return the rights of the client on an export that exists."""
        access = self._rights(name)
        if access is Access.NONE:
            self._note_once(name, name)
        return access

    def _note_once(self, name: str, shown: str) -> None:
        """The client may not attach an export that exists."""
        if name in self._refused:
            return
        self._refused.add(name)
        is_by_rule = not self._is_unknown or self._rules.of(name) is not None
        why = "no rule allows it" if is_by_rule else "it has shown no certificate"
        self._note_refusal(
            "rules" if is_by_rule else "no_certificate",
            f"{self._peer} ({self.client}): may not attach {shown}: {why}",
        )
