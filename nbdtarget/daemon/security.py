# SPDX-License-Identifier: Apache-2.0
"""`Security`: the certificates of all listeners of a process, and who may attach to what."""

import asyncio
import logging
from collections.abc import Container, Mapping, Sequence
from typing import TYPE_CHECKING, Final, NamedTuple

from nbdtarget.common.access import AccessRules, parse_rules
from nbdtarget.common.clock import sleep
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.server.tls import NO_TLS, ListenerTls, TlsOptions
from nbdtarget_protocol.handshake import TlsMode

if TYPE_CHECKING:
    from nbdtarget.config.file import Config

__all__ = ["Security", "SecurityOptions", "security_of"]

log = logging.getLogger(__name__)

EXPIRY_PERIOD_S: Final = 86400.0  # from one look at the certificates to the next


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
        self.tls = ListenerTls(options.tls)
        self._of_listeners = {
            address: ListenerTls(own.or_else(options.tls))
            for address, own in (listeners or {}).items()
        }
        self._taken_over: list[ListenerTls] = []
        self.rules = AccessRules()
        self.set_rules(default, by_export or {})

    def of(self, address: str) -> ListenerTls:
        """TLS of the listener at `address`."""
        return self._of_listeners.get(address, self.tls)

    def taken_over(self, options: TlsOptions) -> ListenerTls:
        """Return TLS of a socket of another process: as it was there, and not as the configuration file says now.

        From the first call on, only such sockets count: this process has no others. Raises: NbdTargetError.
        """
        for tls in self._taken_over:
            if tls.options == options:
                return tls
        tls = ListenerTls(options)
        self._taken_over.append(tls)
        return tls

    def _listeners(self) -> Sequence[ListenerTls]:
        return self._taken_over or (self.tls, *self._of_listeners.values())

    def warn_of_openness(self, address: str) -> None:
        """Log a line if clients of that listener, which other machines can reach, are not asked who they are."""
        tls = self.of(address)
        if tls.mode is TlsMode.OFF:
            log.warning(
                "%s: NBD without TLS (--tls): each machine that can reach this port can read and write"
                " the disks%s, and machines on the way can read what is sent",
                address,
                "" if self.rules.default is None else " as the rules say",
            )
        elif (
            tls.options.psk is None
            and not tls.verifies_peer
            and self.rules.default is None
        ):
            log.warning(
                "%s: TLS encrypts, but clients are not asked who they are: each machine that can reach"
                " this port can read and write the disks (--tls-verify-peer, --access)",
                address,
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

    def reload(self) -> None:
        """Read all certificates again, for connections to come. An error is logged, and the old certificates stay."""
        for tls in self._listeners():
            try:
                tls.reload()
            except NbdTargetError as error:
                log.error("certificates not reloaded: %s", error)

    def certificates(self) -> dict[str, float]:
        """The certificate files of all listeners, and until when each is valid: Unix time."""
        found: dict[str, float] = {}
        for tls in self._listeners():
            if tls is not NO_TLS and tls.certificate_path is not None:
                found[tls.certificate_path] = tls.expires_s
        return found

    async def watch_expiry(self) -> None:
        """Warn once a day of certificates that end. Runs until it is cancelled."""
        while True:
            await sleep(EXPIRY_PERIOD_S)
            try:
                for tls in self._listeners():
                    tls.warn_of_expiry()
            except Exception:
                # A bug of ours. Tomorrow it is tried again.
                log.exception("it was not looked whether certificates expire soon")

    def start_watching(self) -> "asyncio.Task[None] | None":
        """Begin `watch_expiry`, if there is a certificate."""
        if not self.certificates():
            return None
        return asyncio.create_task(self.watch_expiry())


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
