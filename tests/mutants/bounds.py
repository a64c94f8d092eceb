# SPDX-License-Identifier: Apache-2.0
"""Mutants of the bounds that a network needs, of certificates that are renewed, and of what the standard demands of a client and a server that part."""

from typing import Final

from tests.mutants.mutant import Mutant

__all__ = ["BOUNDS"]

MET: Final = "tests/nbdtarget/server/test_bounds.py"
ADMISSION: Final = ("tests/nbdtarget/server/test_admission.py", MET)
SHARES: Final = ("tests/nbdtarget/server/test_shares.py", MET)
FLOW: Final = ("tests/nbdtarget/server/test_flow.py", MET)
PATIENCE: Final = ("tests/nbdtarget/server/test_patience.py", MET)
STALLS: Final = ("tests/nbdtarget/server/test_stalls.py", MET)
HANDSHAKE: Final = ("tests/protocol/test_handshake.py",)
STARTTLS: Final = ("tests/protocol/test_starttls.py",)
TRANSMISSION: Final = (
    "tests/protocol/test_transmission.py",
    "tests/protocol/test_traps.py",
)
SLICED: Final = ("tests/nbdtarget/server/test_sliced_read.py",)
TERMINAL: Final = ("tests/nbdtarget/daemon/test_terminal.py",)
SILENT: Final = ("tests/nbdtarget/common/test_tls_socket.py",)
CERTIFICATES: Final = ("tests/nbdtarget/server/test_tls.py",)
LOSS: Final = ("tests/nbdtarget/devices/nbd/test_loss.py",)

BOUNDS: Final = (
    Mutant(
        "connections-from-the-network-not-bounded",
        "Clients of a network take connections until the server has no descriptor left.",
        "nbdtarget.server.admission:Admission.maybe_refusal",
        (("        elif self._nr_remote >= all_max:\n", "        elif False:\n"),),
        ADMISSION,
        hangs=True,
    ),
    Mutant(
        "connections-on-unix-sockets-not-bounded",
        "A program on this machine takes connections until the server has no descriptor left.",
        "nbdtarget.server.admission:Admission.maybe_refusal",
        (("            if here >= all_max:\n", "            if False:\n"),),
        ADMISSION,
        hangs=True,
    ),
    Mutant(
        "connections-of-one-address-not-bounded",
        "One client of the network takes all connections that there are for all.",
        "nbdtarget.server.admission:Admission.maybe_refusal",
        (("        elif here >= peer_max:\n", "        elif False:\n"),),
        ADMISSION,
        hangs=True,
    ),
    Mutant(
        "last-descriptors-given-to-clients",
        "The control socket and the disks cannot be opened, because clients have all descriptors.",
        "nbdtarget.server.admission:Admission.maybe_refusal",
        (("descriptor >= soft - reserve", "descriptor >= soft"),),
        ADMISSION,
    ),
    Mutant(
        "connections-that-left-still-count",
        "After so many clients no further one may connect.",
        "nbdtarget.server.admission:Admission.leave",
        (("        self._nr_remote -= origin != _UNIX\n", ""),),
        ADMISSION,
    ),
    Mutant(
        "clients-of-one-export-not-bounded",
        "The clients of one export take all connections of the server.",
        "nbdtarget.server.shares:Shares.why_full",
        (("share.nr_connections < bound", "bound"),),
        SHARES,
        hangs=True,
    ),
    Mutant(
        "requests-of-one-export-not-bounded",
        "A suspended export with many small requests uses the budget of all others up.",
        "nbdtarget.server.shares:Share._is_used_up",
        (("self.nr_requests >= self._requests_max or (", "("),),
        SHARES,
        hangs=True,
    ),
    Mutant(
        "bytes-of-one-export-not-bounded",
        "A suspended export with large writes uses the budget of all others up.",
        "nbdtarget.server.shares:Share._is_used_up",
        (("self.nr_bytes + nr_bytes > self._bytes_max", "False"),),
        SHARES,
        hangs=True,
    ),
    Mutant(
        "compiled-reads-forget-the-share",
        "Reads that wait for the disk in the ring do not count for their export.",
        "nbdtarget.server.shares:Share.room",
        (
            (
                "            min(nr_requests, self._requests_max - self.nr_requests),\n",
                "            nr_requests,\n",
            ),
        ),
        SHARES,
    ),
    Mutant(
        "requests-of-one-connection-not-bounded",
        "One client has as many requests in flight as there may be for all.",
        "nbdtarget.server.flow:Flow.bound_met",
        (
            (
                "        if self.nr_requests >= limits.requests_in_flight_max:\n",
                "        if False:\n",
            ),
        ),
        FLOW,
        hangs=True,
    ),
    Mutant(
        "bytes-of-one-connection-not-bounded",
        "One client has as many bytes in flight as there may be for all.",
        "nbdtarget.server.flow:Flow._bytes_max",
        (
            (
                "min(self._limits.bytes_in_flight_max, TIMES_WHAT_IS_LEFT * left)",
                "TIMES_WHAT_IS_LEFT * left",
            ),
        ),
        FLOW,
        hangs=True,
    ),
    Mutant(
        "bytes-of-all-not-bounded",
        "Clients make the server hold as much memory as they like.",
        "nbdtarget.server.limits:Budget.is_full",
        (("self.nr_bytes + nr_bytes > self._bytes_max", "False"),),
        FLOW,
        hangs=True,
    ),
    Mutant(
        "requests-of-all-not-bounded",
        "Clients have as many requests in flight as they like.",
        "nbdtarget.server.limits:Budget.is_full",
        (("self.nr_requests >= self._requests_max", "False"),),
        FLOW,
        hangs=True,
    ),
    Mutant(
        "replies-that-are-not-taken-not-bounded",
        "A client that asks and takes nothing makes the server keep all of its answers.",
        "nbdtarget.server.requests:Requests._admit",
        (("        if self._output.is_full:\n", "        if False:\n"),),
        (MET, "tests/nbdtarget/server/test_requests.py"),
        hangs=True,
    ),
    Mutant(
        "handshakes-not-bounded",
        "Clients that connect and say nothing keep all others out.",
        "nbdtarget.server.listener:Listener._make_room_for_handshake",
        (
            (
                "            min(shaking, key=lambda each: each.state == HANDSHAKE).abort()\n",
                "            pass\n",
            ),
        ),
        (*SHARES, *ADMISSION),
        hangs=True,
    ),
    Mutant(
        "silent-handshake-has-the-time-of-a-whole-one",
        "A client that connects and says nothing stays for two minutes.",
        "nbdtarget.server.patience:Patience._handshake_timed_out",
        (("nr_options > before and not", "not"),),
        PATIENCE,
        hangs=True,
    ),
    Mutant(
        "stalled-handshake-of-tls-has-twice-the-time",
        "STARTTLS gives a client that stalls then as much time as an option gives one that goes on.",
        "nbdtarget.server.patience:Patience._handshake_timed_out",
        ((" and not self._handshake.starts_tls", ""),),
        PATIENCE,
    ),
    Mutant(
        "handshake-that-never-ends",
        "A client that sends an option now and then stays in its handshake for ever.",
        "nbdtarget.server.patience:Patience._handshake_timed_out",
        ((" and total_s < limits.handshake_total_s:", ":"),),
        PATIENCE,
        hangs=True,
    ),
    Mutant(
        "options-for-ever",
        "A client asks for lists and lists, and reads none of them: the server keeps them all.",
        "nbdtarget_protocol.handshake:ServerHandshake._refuse_by_header",
        (
            (
                "        if self._output_total > 2 * self.output_max:\n",
                "        if False:\n",
            ),
        ),
        HANDSHAKE,
    ),
    Mutant(
        "stalled-clients-stay",
        "A client that takes no replies, or stops in a payload, keeps its connection for ever.",
        "nbdtarget.server.stalls:Stalls._look",
        (
            (
                '        self._end(connections, "stall_total_s", "stalled")\n',
                "",
            ),
        ),
        STALLS,
        hangs=True,
    ),
    Mutant(
        "stalled-clients-stay-while-others-wait",
        "Clients that stall in large writes hold the memory that others wait for.",
        "nbdtarget.server.stalls:Stalls._look_for_the_starved",
        (
            (
                '        self._end(connections, "stall_timeout_s", "stalled while others wait")\n',
                "",
            ),
        ),
        STALLS,
        hangs=True,
    ),
    Mutant(
        "bound-that-is-met-does-not-count",
        "A metric says that no client ever met a bound.",
        "nbdtarget.server.bounds:BoundsMet.met",
        (("        self.counts[name] += 1\n", "        pass\n"),),
        (MET,),
        hangs=True,
    ),
    Mutant(
        "chunk-longer-than-was-advertised",
        "A client that believes the maximum payload it was told gets a chunk that is longer, and disconnects.",
        "nbdtarget.server.replies:_push_read",
        (("    if length > chunk_max:\n", "    if False:\n"),),
        SLICED,
    ),
    Mutant(
        "unfragmented-read-in-two-chunks",
        "A client that demanded one chunk gets two.",
        "nbdtarget_protocol.transmission:ServerTransmission.refusal",
        (("flags & CMD_FLAG_DF and length > self.chunk_max", "False"),),
        TRANSMISSION,
    ),
    Mutant(
        "tls-without-fixed-newstyle",
        "A client that does not speak fixed newstyle gets an acknowledgement that it does not understand.",
        "nbdtarget_protocol.handshake:ServerHandshake._handle_starttls",
        (("        if not self._is_fixed:\n", "        if False:\n"),),
        STARTTLS,
    ),
    Mutant(
        "unknown-options-during-a-shutdown",
        "A client whose option is unknown goes on asking a server that stops.",
        "nbdtarget_protocol.handshake:ServerHandshake._end_swallowed",
        (("        if self.shutting_down and", "        if False and"),),
        HANDSHAKE,
    ),
    Mutant(
        "server-that-stops-is-left-without-a-goodbye",
        "A server below that is shutting down takes us for a client that crashed.",
        "nbdtarget.devices.nbd.connection:NbdConnection._end_if_answered",
        (("            self._say_goodbye()\n", ""),),
        LOSS,
        hangs=True,
    ),
    Mutant(
        "sighup-ends-a-server-with-certificates",
        "An administrator who renews a certificate and sends SIGHUP, as the warning says, ends the server.",
        "nbdtarget.daemon.daemon:Daemon._hung_up",
        (("self.security.has_certificates and not is_closed", "False"),),
        TERMINAL,
        hangs=True,
    ),
    Mutant(
        "closed-terminal-only-renews-certificates",
        "A server goes on without its terminal, where no user sees it any more.",
        "nbdtarget.daemon.daemon:Daemon._hung_up",
        ((" and not is_closed", ""),),
        TERMINAL,
        hangs=True,
    ),
    Mutant(
        "sighup-says-so-and-renews-nothing",
        "The log says that the certificates were read again, and new clients see the old one until it expires.",
        "nbdtarget.daemon.daemon:Daemon._hung_up",
        (("            if self.security.reload():\n", "            if True:\n"),),
        TERMINAL,
        hangs=True,
    ),
    Mutant(
        "reload-of-the-file-renews-no-certificates",
        "With a configuration file, SIGHUP leaves the old certificates.",
        "nbdtarget.daemon.daemon:Daemon.follow_rules",
        (("        self.security.reload()\n", ""),),
        ("tests/nbdtarget/daemon/test_security.py",),
    ),
    Mutant(
        "renewed-certificate-keeps-the-old-end",
        "Status and metric warn of the end of a certificate that has been renewed.",
        "nbdtarget.server.tls:ListenerTls.reload",
        (
            (
                "        self.ends = {path: end for",
                "        self.ends = self.ends or {path: end for",
            ),
        ),
        CERTIFICATES,
    ),
    Mutant(
        "wrong-certificate-ends-the-reload",
        "One wrong certificate, and those of the other listeners stay old.",
        "nbdtarget.daemon.security:Security.reload",
        (
            (
                "                errors[str(error)] = None\n",
                "                errors[str(error)] = None\n                break\n",
            ),
        ),
        ("tests/nbdtarget/daemon/test_security.py",),
    ),
    Mutant(
        "keys-changed-for-ever",
        "A client that only changes keys keeps the event loop busy, and all others wait.",
        "nbdtarget.common.tls_socket:TlsSocket._receive_more",
        (("        if self._nr_silent > SILENT_MAX:\n", "        if False:\n"),),
        SILENT,
        hangs=True,
    ),
    Mutant(
        "what-says-something-counts-as-silent",
        "A client that sends much is taken for one that only changes keys, and is disconnected.",
        "nbdtarget.common.tls_socket:TlsSocket.recv_into",
        (("                self._nr_silent = 0\n", "                pass\n"),),
        SILENT,
    ),
)
