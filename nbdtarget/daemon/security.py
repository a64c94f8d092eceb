# SPDX-License-Identifier: Apache-2.0
"""`Security`: the certificates of all listeners of a process, and who may attach to what."""

import asyncio
import logging
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdtarget.common.access import AccessRules, parse_rules
from nbdtarget.common.clock import sleep, wall_clock_s
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.x509 import End
from nbdtarget.daemon.expiry import DiskCertificates, expiry_warning
from nbdtarget.server.tls import (
    VERIFIES_WITHOUT_TLS,
    ListenerTls,
    TlsOptions,
)
from nbdtarget_protocol.handshake import TlsMode

if TYPE_CHECKING:
    from nbdtarget.config.file import Config

__all__ = ["Security", "SecurityOptions", "security_of"]

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S: Final = 86400.0  # from one look at the certificates to the next
_REACHES_PORT: Final = "each machine that can reach this port"


class SecurityOptions(NamedTuple):
    """The security options for all listeners and exports.

    Attributes: access: rules of exports that have none of their own; None: everybody may attach.
    """

    tls: TlsOptions = TlsOptions()
    access: tuple[str, ...] | None = None


class Security:
    """See the module head.

    Attributes:
        tls: of listeners without words of their own.
        rules: who may attach to what.
        disks: returns the names of the disks that are open, which may have certificates of their own.
    """

    def __init__(
        self,
        options: SecurityOptions | None = None,
        listeners: Mapping[str, TlsOptions] | None = None,
        default: tuple[str, ...] | None = None,
        by_export: Mapping[str, tuple[str, ...]] | None = None,
    ) -> None:
        """Read all certificates.

        Args:
            listeners: by address, what a listener says of its own.
            default, by_export: see `set_rules`.
        Raises: NbdTargetError: a file is missing or wrong, or a rule is none.
        """
        options = options or SecurityOptions()
        self._options = options
        listeners = listeners or {}
        _check_verification(options.tls, listeners)
        self._by_options: dict[TlsOptions, ListenerTls] = {}
        self.tls = self._tls_with(options.tls)
        self._of_listeners = {
            address: self._tls_with(own.or_else(options.tls))
            for address, own in listeners.items()
        }
        self._taken_over: list[ListenerTls] = []
        self.disks: Callable[[], Iterable[str]] = tuple
        self._of_disks = DiskCertificates()
        self.warn_of_expiry()
        self.rules = AccessRules()
        self.set_rules(default, by_export or {})

    def _tls_with(self, options: TlsOptions) -> ListenerTls:
        """Return the same object for the same options, so that its files are read, and complained of, once."""
        tls = self._by_options.get(options)
        if tls is None:
            tls = self._by_options[options] = ListenerTls(options)
        return tls

    def of(self, address: str) -> ListenerTls:
        """TLS of the listener at `address`."""
        return self._of_listeners.get(address, self.tls)

    def taken_over(self, options: TlsOptions) -> ListenerTls:
        """Return TLS of a socket of another process: as it was there, and not as the configuration file says now.

        From the first call on, only such sockets count: this process has no others. Raises: NbdTargetError.
        """
        tls = self._tls_with(options)
        if tls not in self._taken_over:
            self._taken_over.append(tls)
        return tls

    def _listeners(self) -> Sequence[ListenerTls]:
        return self._taken_over or tuple(self._by_options.values())

    def warn_of_openness(self, listeners: Mapping[str, ListenerTls]) -> None:
        """Log a line if clients of listeners that other machines can reach are not asked who they are.

        Args: listeners: by their addresses, as `Listener.public_addresses` returns them.
        """
        found: dict[str, list[str]] = {}
        for address, tls in listeners.items():
            found.setdefault(self._openness(address, tls), []).append(address)
        for reason, addresses in found.items():
            if reason:
                log.warning("%s: %s", ", ".join(addresses), reason)

    def _openness(self, address: str, tls: ListenerTls) -> str:
        """Return how open a listener is, as a sentence; "": its clients are asked who they are."""
        has_rules = self.rules.default is not None
        disks = "the disks that have no rules" if self.rules.by_export else "the disks"
        if address.startswith("vsock:"):
            # What is sent stays in this machine, so only who may attach matters.
            is_open = not (has_rules or tls.knows_clients)
            reason = f"each virtual machine of this host can read and write {disks} (--access)"
            return reason if is_open else ""
        if tls.mode is TlsMode.OFF:
            by_rules = " as the rules say" if has_rules else ""
            return (
                f"NBD without TLS (--tls): {_REACHES_PORT} can read and write the disks{by_rules}, and machines"
                " on the way can read what is sent"
            )
        if has_rules or tls.knows_clients:
            return ""
        encrypts = "is offered" if tls.mode is TlsMode.ON else "encrypts"
        remedy = "--tls require" if tls.options.psk else "--tls-verify-peer"
        return (
            f"TLS {encrypts}, but clients are not asked who they are: {_REACHES_PORT} can read and write"
            f" {disks} ({remedy}, --access)"
        )

    def set_rules(
        self,
        default: tuple[str, ...] | None,
        by_export: Mapping[str, tuple[str, ...]],
        keep: Container[str] = (),
    ) -> None:
        """Take the rules of a configuration file. The `default` rules of the command line win.

        Args: keep: exports that the file does not name, and that are served: if it has named them before, their rules stay.
        Raises: NbdTargetError.
        """
        parsed = {name: parse_rules(rules) for name, rules in by_export.items()}
        before = {**self.rules.kept, **self.rules.by_export}
        self.rules.kept = {name: before[name] for name in before if name in keep}
        given = default if self._options.access is None else self._options.access
        self.rules.default = None if given is None else parse_rules(given)
        self.rules.by_export = parsed
        if any(rule.wants_certificate for rule in self.rules.all_rules()) and not any(
            each.verifies_peer for each in self._listeners()
        ):
            log.warning(
                "rules with cert: match no client: no listener verifies certificates"
                " (--tls-verify-peer, or tls_verify_peer in the configuration file)"
            )

    def reload(self) -> bool:
        """Read all certificates again, for connections to come. Returns whether that was possible.

        What cannot be read is logged, once for each file, and the old certificates stay.
        """
        errors: dict[str, None] = {}
        for tls in self._listeners():
            try:
                tls.reload()
            except NbdTargetError as error:
                errors[str(error)] = None
        for each in errors:
            log.error("certificates not reloaded: %s", each)
        self.warn_of_expiry()
        return not errors

    @property
    def has_certificates(self) -> bool:
        """Whether a listener has some."""
        return any(tls.ends for tls in self._listeners())

    def _ends(self) -> dict[str, End]:
        """Return what ends first in each file of the listeners and of the disks."""
        found = self._of_disks.ends(self.disks())
        for tls in self._listeners():
            found.update(tls.ends)
        return found

    def certificates(self) -> dict[str, float]:
        """The files of certificates of the listeners and of the disks, and until when all in them is valid: Unix time."""
        return {path: end.expires_s for path, end in self._ends().items()}

    def warn_of_expiry(self) -> None:
        """Log a line for each file in which something has ended, or will soon."""
        now_s = wall_clock_s()
        for path, end in self._ends().items():
            if warning := expiry_warning(path, end, now_s):
                log.warning("%s", warning)

    async def watch_expiry(self) -> None:
        """Warn once a day of certificates that end. Runs until it is cancelled."""
        while True:
            await sleep(EXPIRY_PERIOD_S)
            try:
                self.warn_of_expiry()
            except Exception:
                # A bug of ours. Tomorrow it is tried again.
                log.exception("it was not looked whether certificates expire soon")

    def start_watching(self) -> "asyncio.Task[None]":
        """Begin `watch_expiry`. Disks with certificates may come later."""
        return asyncio.create_task(self.watch_expiry())


def _check_verification(
    default: TlsOptions, listeners: Mapping[str, TlsOptions]
) -> None:
    """Raises: NbdTargetError: clients are to show a certificate, and no listener has TLS, so that none would be asked for one."""
    merged = [own.or_else(default) for own in listeners.values()]
    is_in_vain = bool(default.verify_peer) and all(
        each.tls_mode is TlsMode.OFF for each in (default, *merged)
    )
    for own, used in zip(listeners.values(), merged, strict=True):
        is_in_vain |= bool(own.verify_peer) and used.tls_mode is TlsMode.OFF
    if is_in_vain:
        raise NbdTargetError(VERIFIES_WITHOUT_TLS)


def security_of(options: SecurityOptions, config: "Config | None") -> Security:
    """Return the options of a command, and for those that it does not have, the ones of its configuration file. Raises: NbdTargetError."""
    if config is None:
        return Security(options)
    return Security(
        SecurityOptions(options.tls.or_else(config.tls), options.access),
        config.listen_tls,
        config.access,
        config.access_by_export,
    )
