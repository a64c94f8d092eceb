# SPDX-License-Identifier: Apache-2.0
"""Mutants of TLS and of the rules: what others got wrong, planted here."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["TLS"]

STARTTLS: Final = ("tests/protocol/test_starttls.py",)
SOCKET: Final = ("tests/nbdtarget/common/test_tls_socket.py",)
RULES: Final = ("tests/nbdtarget/common/test_access.py",)
CLIENTS: Final = ("tests/nbdtarget/server/test_negotiation.py",)
UPGRADE: Final = ("tests/nbdtarget/daemon/test_daemon.py",)

TLS: Final = (
    Mutant(
        "structured-replies-survive-starttls",
        "An attacker in the network chooses the options of the encrypted connection.",
        "nbdtarget_protocol.handshake:ServerHandshake.tls_started",
        (("        self.structured = self.extended = False\n", ""),),
        STARTTLS,
    ),
    Mutant(
        "plaintext-behind-starttls-is-kept",
        "Options that somebody on the wire appended to STARTTLS count as the client's own.",
        "nbdtarget_protocol.handshake:ServerHandshake._handle_starttls",
        (("        if self._buffer:\n", "        if False:\n"),),
        STARTTLS,
    ),
    Mutant(
        "client-goes-on-without-tls",
        "A server, or somebody in between, talks the client out of TLS.",
        "nbdtarget_protocol.client_handshake:ClientHandshake._handle_error",
        (
            (
                "        elif option == OPT_STRUCTURED_REPLY and not fatal:",
                "        elif option in (OPT_STRUCTURED_REPLY, OPT_STARTTLS) and not fatal:",
            ),
        ),
        STARTTLS,
    ),
    Mutant(
        "options-are-answered-before-tls",
        "Where TLS is required, names of exports are told in plain text.",
        "nbdtarget_protocol.handshake:ServerHandshake._refuse_by_header",
        (("            self.tls is TlsMode.REQUIRE", "            False"),),
        STARTTLS,
    ),
    Mutant(
        "sealed-bytes-are-sealed-again",
        "What the socket did not take at once is encrypted and sent twice.",
        "nbdtarget.common.tls_socket:TlsSocket.sendmsg",
        (("                self._sealed = nr\n", ""),),
        SOCKET,
    ),
    Mutant(
        "received-bytes-are-not-pending",
        "Requests that TLS has received already wait until the client sends more.",
        "nbdtarget.common.tls_socket:TlsSocket.has_pending",
        (
            (
                "        return self._is_full or bool(self._ahead) or self._incoming.pending > 0\n",
                "        return False\n",
            ),
        ),
        SOCKET,
    ),
    Mutant(
        "encrypted-writes-are-forgotten",
        "A write that was encrypted and given up is carried out after a later write to the same place.",
        "nbdtarget.devices.nbd.connection:NbdConnection.give_up",
        (("            sealed = self._take_sealed()\n", "            sealed = []\n"),),
        ("tests/nbdtarget/devices/nbd/test_tls.py",),
        hangs=True,
    ),
    Mutant(
        "an-upgrade-serves-an-encrypted-socket-in-the-clear",
        "A socket whose clients must use TLS is plain after an upgrade, when its address has gone from the file.",
        "nbdtarget.daemon.daemon:Daemon._take_over",
        (("fds, security.taken_over)", "fds, lambda _: security.tls)"),),
        UPGRADE,
    ),
    Mutant(
        "an-upgrade-drops-the-token",
        "The control socket does what any client says after an upgrade, when the token has gone from the file.",
        "nbdtarget.daemon.daemon:Daemon._take_over",
        (("            tokens=moved.tokens,\n", ""),),
        UPGRADE,
    ),
    Mutant(
        "an-upgrade-forgets-the-rules-that-the-file-had",
        "A device that has left the file, and is served on, is open to everybody after an upgrade.",
        "nbdtarget.daemon.daemon:Daemon._take_over",
        (("moved.kept_rules)", "{})"),),
        UPGRADE,
    ),
    Mutant(
        "rules-go-with-the-lines-of-the-file",
        "A reload opens a device that is served on to everybody, because the file does not name it any more.",
        "nbdtarget.daemon.daemon:Daemon.follow_rules",
        (("config.access_by_export, unnamed)", "config.access_by_export)"),),
        UPGRADE,
    ),
    Mutant(
        "no-rule-is-access",
        "A client for which no rule holds may attach.",
        "nbdtarget.common.access:AccessRules.access",
        (("        return Access.NONE\n", "        return Access.WRITE\n"),),
        RULES,
    ),
    Mutant(
        "one-condition-is-enough",
        "A client from the right network needs no certificate.",
        "nbdtarget.common.access:Rule.holds",
        (("        return all(", "        return any("),),
        RULES,
    ),
    Mutant(
        "rules-are-lost-by-a-rename",
        "A device that gets another name is open to everybody.",
        "nbdtarget.common.access:AccessRules.renamed",
        (("            self.by_command[new] = rules\n", "            pass\n"),),
        RULES,
    ),
    Mutant(
        "hidden-exports-are-listed",
        "A client learns the names of disks that it may not attach.",
        "nbdtarget.server.export:DirectoryExports.names",
        (
            (
                "            if self._rights(name) is not Access.NONE:",
                "            if True:",
            ),
        ),
        CLIENTS,
    ),
    Mutant(
        "clients-without-a-certificate-are-served",
        "A listener that verifies certificates also serves clients without TLS.",
        "nbdtarget.server.export:DirectoryExports._rights",
        (
            (
                "        if self._is_unknown and self._rules.of(name) is None:",
                "        if False:",
            ),
        ),
        CLIENTS,
    ),
    Mutant(
        "default-export-tells-of-hidden-ones",
        "The answer to the empty name depends on disks that the client may not attach.",
        "nbdtarget.server.export:DirectoryExports._default",
        (
            (
                "for name in names if self._rights(name) is not Access.NONE]",
                "for name in names]",
            ),
        ),
        CLIENTS,
    ),
    Mutant(
        "read-only-clients-may-write",
        "A client that may only read changes the disk.",
        "nbdtarget.server.export:DirectoryExports._lookup",
        (("read_only=access is Access.READ", "read_only=False"),),
        CLIENTS,
    ),
)
