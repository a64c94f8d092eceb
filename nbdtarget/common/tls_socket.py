# SPDX-License-Identifier: Apache-2.0
"""`TlsSocket`: TLS on a connected, non-blocking socket, with the few methods that our connections use.

Theory of operation. Between the socket and its user stand OpenSSL and two memory buffers:

    recv_into   socket -> incoming -> decrypted, as much as there is room for
    sendmsg     encrypted ("sealed") -> outgoing -> socket

Behind the handshake this is done by compiled code, where it can be (`nbdtarget/fast/nbdtarget_tls.pyx`, its twin), with the same `SSL`
object of OpenSSL and buffers of its own. What follows is true of both.

One receive and one send carry many records. OpenSSL on the socket itself would take two system calls for each record
received, and one for each record sent; a record has 16 KiB at most.

Readiness. The kernel knows nothing of what lies in `incoming`. So after a `recv_into` that did not raise
BlockingIOError there may be more although the socket is not readable: `has_pending` tells. A caller either
receives until BlockingIOError, or looks at `has_pending` before it goes back to the event loop.

Sending. What is sealed cannot be taken back, and has to leave whole. `send` and `sendmsg` count a byte as sent when
its record has left. If the socket does not take all, they raise BlockingIOError, and `sealed` says how
many bytes are on their way: **the next call must begin with the same bytes**, and returns their number when they have left.

Ends. The peer's close_notify and the end of the stream without one are both the end: recv_into returns 0. A stream
that is cut off is no danger here: each NBD message says how long it is, so half a message is noticed and not
carried out. `shutdown(SHUT_WR)` and `close` send a close_notify, if the socket takes it.

Renegotiation is refused by the context (`tls_context.py`). An answer of OpenSSL to the peer, for example that refusal,
is sent while receiving. A peer that makes answers and does not read them is disconnected at
ANSWERS_MAX, and so is one whose TLS handshake takes more than HANDSHAKE_BYTES_MAX. A peer that sends more than SILENT_MAX without a
byte for us is disconnected, too: it sends records of TLS itself, as new keys again and again. Each of them takes 10 us, and a
call that receives would not return as long as they come. Time is the caller's to bound.
"""

import contextlib
import errno as errnos
import socket
import ssl
import threading
from collections.abc import Iterable
from typing import Any, Final

from nbdtarget.common.words import printable
from nbdtarget.common.x509 import subject_of
from nbdtarget.fast.compiled import TlsRecords, take_over

__all__ = ["ANSWERS_MAX", "HANDSHAKE_BYTES_MAX", "TlsError", "TlsSocket"]

RECEIVE_MAX: Final = 64 << 10  # encrypted bytes, with one system call
SILENT_MAX: Final = (
    48 << 10
)  # encrypted bytes in which nothing was said; a record has a third of that
SEAL_MAX: Final = (
    272 << 10
)  # bytes that are encrypted before they are sent: a reply of 256 KiB with its header, too
SEND_MAX: Final = 1 << 20  # bytes in one call of `sendmsg`
JOIN_MAX: Final = 16 << 10  # shorter pieces share a record
AHEAD_MAX: Final = 1 << 20  # bytes that a peek decrypts
ANSWERS_MAX: Final = 64 << 10  # bytes of answers that the peer does not read
HANDSHAKE_BYTES_MAX: Final = 256 << 10  # of the peer, chains of certificates included
NAME_LENGTH_MAX: Final = 200  # characters, of a name that is not verified

# Errors that users can do something about; the keys are OpenSSL's.
_SENTENCES: Final = {
    "CERTIFICATE_VERIFY_FAILED": "the peer's certificate is not accepted",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer showed no certificate, and one is required",
    "NO_SHARED_CIPHER": "no cipher in common",
    "UNSUPPORTED_PROTOCOL": "the peer speaks no TLS version that is allowed here (1.2 and later)",
    "WRONG_VERSION_NUMBER": "what came is not TLS",
    "HTTP_REQUEST": "what came is not TLS",
    "TLSV1_ALERT_UNKNOWN_CA": "the peer does not know the authority (CA) of our certificate",
    "SSLV3_ALERT_BAD_CERTIFICATE": "the peer does not accept our certificate",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer requires a certificate, and we showed none",
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the peer found nothing in common with us, or requires a certificate",
}


# Why a peer is refused because of its certificate; the keys are OpenSSL's.
_KINDS: Final = {
    "CERTIFICATE_VERIFY_FAILED": "certificate",
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "no_certificate",
}


class TlsError(OSError):
    """TLS has failed on this connection: it must be closed. `str()` is one line.

    Attributes: kind: "certificate": that of the peer is not accepted; "no_certificate": it showed none; "tls": anything else.
    """

    def __init__(self, reason: str, kind: str = "tls") -> None:
        super().__init__(errnos.EPROTO, reason)
        self.reason = reason
        self.kind = kind

    def __str__(self) -> str:
        return f"TLS: {self.reason}"


class _Scratch(threading.local):
    """Where encrypted bytes are received: used within one call only, so one for each thread is enough."""

    def __init__(self) -> None:
        self.view = memoryview(bytearray(RECEIVE_MAX))


_scratch: Final = _Scratch()
_take_over = take_over  # tests choose the twin
_NOTHING: Final = memoryview(b"")


class TlsSocket:
    """See the module head.

    Args:
        sock: connected and non-blocking; this object owns it from now on.
        server_hostname: of a client: the name that the server's certificate must have.

    Attributes:
        records: the compiled twin, from the end of the handshake; None: there is none, or not yet.
    """

    __slots__ = (
        "_ahead",
        "_incoming",
        "_is_done",
        "_is_full",
        "_is_more_likely",
        "_nr_handshake",
        "_nr_silent",
        "_outgoing",
        "_sealed",
        "_sock",
        "_ssl",
        "_unsent",
        "records",
    )

    def __init__(
        self,
        sock: socket.socket,
        context: ssl.SSLContext,
        *,
        server_side: bool,
        server_hostname: str | None = None,
    ) -> None:
        self.records: TlsRecords | None = None
        self._sealed = 0
        self._sock = sock
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._ssl = context.wrap_bio(
            self._incoming,
            self._outgoing,
            server_side=server_side,
            server_hostname=server_hostname,
        )
        self._unsent = _NOTHING  # encrypted bytes that the socket did not take
        self._ahead = bytearray()  # decrypted by a peek
        self._is_full = False  # the last record may not have been read to its end
        self._is_done = False  # the handshake
        self._is_more_likely = False  # the last receive was as long as it may be
        self._nr_handshake = 0
        self._nr_silent = 0  # encrypted bytes since the last one that was decrypted

    # ---- the handshake ----

    def handshake(self) -> bool:
        """Go on with the TLS handshake; whether it is over.

        If not, call again when the socket is readable, or writable if `has_unsent`.
        Raises: TlsError, OSError.
        """
        while True:
            if not self._is_done:
                try:
                    self._ssl.do_handshake()
                    self._is_done, self._nr_silent = True, 0
                except ssl.SSLWantReadError:
                    pass
                except ssl.SSLError as error:
                    with contextlib.suppress(OSError):
                        self._drain()  # the alert that says why
                    kind = _KINDS.get(str(error.reason), "tls")
                    reason = f"handshake: {_sentence(error)}"
                    if kind == "certificate":
                        reason += self._refused_name()
                    raise TlsError(reason, kind) from None
            if not self._drain():
                return False
            if self._is_done:
                self.records = self.records or _take_over(
                    self._ssl, self._sock.fileno(), _error_of, SILENT_MAX, ANSWERS_MAX
                )
                return True
            try:
                self._nr_handshake += self._receive()
            except BlockingIOError:
                return False
            if self._nr_handshake > HANDSHAKE_BYTES_MAX:
                reason = f"more than {HANDSHAKE_BYTES_MAX} bytes of handshake"
                raise TlsError(reason)

    def _refused_name(self) -> str:
        """Return the name in the peer's certificate, which was not accepted, for the log. It proves nothing.

        `getpeercert` tells nothing about it, because OpenSSL keeps the certificate only if it was accepted. What is kept is
        the chain as far as it could be built, with the peer's own certificate first. Python 3.13 tells that; before, its inner
        object does. Nothing can be had where TLS failed before the certificate was looked at, and of a pre-shared key.
        """
        chain_of = getattr(self._ssl, "get_verified_chain", None) or getattr(
            getattr(self._ssl, "_sslobj", None), "get_verified_chain", None
        )
        chain: Any = chain_of() if chain_of is not None else None
        if not chain:
            return ""
        first = chain[0]
        if not isinstance(first, bytes):
            first = ssl.PEM_cert_to_DER_cert(first.public_bytes())
        try:
            name = subject_of(first)
        except (ValueError, IndexError):
            return ""
        return f" (the name in it: {printable(name, NAME_LENGTH_MAX)})"

    @property
    def has_unsent(self) -> bool:
        """Whether encrypted bytes wait for the socket."""
        if self.records is not None:
            return self.records.has_unsent
        return bool(self._unsent) or self._outgoing.pending > 0

    @property
    def sealed(self) -> int:
        """Bytes of the last `sendmsg` that are encrypted and have not left whole."""
        return self._sealed if self.records is None else self.records.sealed

    @property
    def version(self) -> str:
        """For example, "TLSv1.3"."""
        return self._ssl.version() or ""

    def peer_names(self) -> tuple[str, ...]:
        """The names in the peer's certificate, if it was verified: subject CN, then SANs, each once."""
        certificate: Any = self._ssl.getpeercert() or {}  # its type is a thicket
        subject = [entry for part in certificate.get("subject", ()) for entry in part]
        names = [name for kind, name in subject if kind == "commonName"]
        names += [each[1] for each in certificate.get("subjectAltName", ())]
        return tuple(dict.fromkeys(name for name in names if isinstance(name, str)))

    # ---- receiving ----

    @property
    def has_pending(self) -> bool:
        """Whether bytes may be had without the socket being readable."""
        if self.records is not None:
            return self.records.has_pending
        return self._is_full or bool(self._ahead) or self._incoming.pending > 0

    # hot: 2 us for each record
    def recv_into(self, view: memoryview) -> int:
        """Receive as much as there is, up to the length of `view`; 0: the end.

        Raises: BlockingIOError: there is nothing now. TlsError, OSError.
        """
        if self.records is not None:
            return self.records.recv_into(view)
        if self._ahead:
            nr = min(len(view), len(self._ahead))
            view[:nr] = self._ahead[:nr]
            del self._ahead[:nr]
            return nr
        got, size = 0, len(view)
        incoming = self._incoming
        read = self._ssl.read
        if not (self._is_full or incoming.pending):
            self._receive()
        try:
            while True:
                try:
                    nr = int(read(size - got, view[got:]))
                except ssl.SSLWantReadError:
                    if self._outgoing.pending:
                        self._answer()
                    if not self._receive_more(has_some=got > 0):
                        break
                    continue
                except (ssl.SSLZeroReturnError, ssl.SSLEOFError):
                    nr = 0
                got += nr
                self._nr_silent = 0
                if not nr or got == size:
                    break
                if not (incoming.pending or self._is_more_likely):
                    break
        except ssl.SSLError as error:
            raise TlsError(_sentence(error)) from None
        # An end that came behind data is told by the next call.
        self._is_full = got == size or (got > 0 and not nr)
        if self._outgoing.pending:
            self._answer()
        return got

    def recv(self, size: int, flags: int = 0) -> bytes:
        """As `recv_into`. With MSG_PEEK: what can be had now, and still can be had afterwards."""
        if flags & socket.MSG_PEEK:
            return self._peek(min(size, AHEAD_MAX))
        data = bytearray(size)
        return bytes(data[: self.recv_into(memoryview(data))])

    def recvmsg_into(self, views: list[memoryview]) -> tuple[int, None, int, None]:
        """As `recv_into`, into the first of `views` only."""
        return self.recv_into(views[0]), None, 0, None

    def _peek(self, size: int) -> bytes:
        if self.records is not None:
            return self.records.peek(size)
        ahead = self._ahead
        room = memoryview(bytearray(64 << 10))
        while len(ahead) < size:
            kept, self._ahead = ahead, bytearray()
            try:
                nr = self.recv_into(room)
            except BlockingIOError:
                nr = 0
            finally:
                self._ahead = ahead = kept
            if not nr:
                break
            ahead += room[:nr]
        if not ahead:
            raise BlockingIOError
        return bytes(ahead[:size])

    def _receive_more(self, *, has_some: bool) -> bool:
        """Receive more: all earlier bytes are decrypted. Return False if the caller has some, and no more is likely or there.

        Raises: BlockingIOError: there is nothing now. TlsError, OSError.
        """
        if has_some and not self._is_more_likely:
            return False
        if self._nr_silent > SILENT_MAX:
            raise TlsError("the peer sends much and says nothing")
        try:
            self._receive()
        except BlockingIOError:
            self._is_more_likely = False
            if has_some:
                return False
            raise
        return True

    def _receive(self) -> int:
        view = _scratch.view
        nr = self._sock.recv_into(view)
        self._is_more_likely = nr == RECEIVE_MAX
        self._nr_silent += nr
        if nr:
            self._incoming.write(view[:nr])
        else:
            self._incoming.write_eof()
        return nr

    def _answer(self) -> None:
        # A peer that has gone takes no answer. What it sent before is received all the same.
        with contextlib.suppress(ConnectionError):
            self._drain()
        if len(self._unsent) + self._outgoing.pending > ANSWERS_MAX + 2 * self._sealed:
            raise TlsError("the peer makes answers and does not read them")

    # ---- sending ----

    def send(self, data: memoryview | bytes) -> int:
        """As `sendmsg`, of one piece."""
        return self.sendmsg((data,))

    # hot: once for each batch
    def sendmsg(self, pieces: Iterable[memoryview | bytes]) -> int:
        """Encrypt and send; return how many bytes have left. See *Sending* in the module head.

        Raises: BlockingIOError: nothing has left, or not all that was sealed. TlsError, OSError.
        """
        if self.records is not None:
            return self.records.sendmsg(pieces)
        if not self._drain():
            raise BlockingIOError
        if self._sealed:
            nr, self._sealed = self._sealed, 0
            return nr
        left = [memoryview(piece) for piece in pieces]
        total = 0
        while left and total < SEND_MAX:
            try:
                nr = self._seal(left)
            except ssl.SSLError as error:
                raise TlsError(_sentence(error)) from None
            if not self._drain():
                self._sealed = nr
                if not total:
                    raise BlockingIOError
                return total
            total += nr
        return total

    def _seal(self, left: list[memoryview]) -> int:
        """Encrypt up to SEAL_MAX bytes, taken from the front of `left`; return how many."""
        write = self._ssl.write
        nr, nr_pieces = 0, 0
        small: list[memoryview] = []
        for piece in left:
            room = SEAL_MAX - nr
            if not room:
                break
            taken = piece[:room] if len(piece) > room else piece
            nr += len(taken)
            if len(taken) < JOIN_MAX and len(left) > 1:
                small.append(taken)
            else:
                if small:
                    write(b"".join(small))
                    small.clear()
                if taken:
                    write(taken)
            if len(taken) < len(piece):
                left[nr_pieces] = piece[room:]
                break
            nr_pieces += 1
        if small:
            write(b"".join(small))
        del left[:nr_pieces]
        return nr

    def _drain(self) -> bool:
        """Send what is encrypted; whether all of it has left."""
        if self.records is not None:
            return self.records.drain()
        while True:
            if not self._unsent:
                if not self._outgoing.pending:
                    return True
                self._unsent = memoryview(self._outgoing.read())
            try:
                nr = self._sock.send(self._unsent)
            except BlockingIOError:
                return False
            self._unsent = self._unsent[nr:] if nr < len(self._unsent) else _NOTHING

    # ---- ends ----

    def fileno(self) -> int:
        return self._sock.fileno()

    def give_up(self) -> socket.socket:
        """After a handshake that has failed: return the socket, which is the caller's from now on."""
        return self._sock

    def shutdown(self, how: int) -> None:
        """As of a socket. Before our half is closed the peer gets a close_notify."""
        if how != socket.SHUT_RD:
            self._say_goodbye()
        self._sock.shutdown(how)

    def close(self) -> None:
        """Close, after a close_notify if the socket takes it. Idempotent."""
        if self._sock.fileno() != -1:
            self._say_goodbye()
            self._sock.close()
            if self.records is not None:
                self.records.close()

    def _say_goodbye(self) -> None:
        if not self._is_done:
            return
        # The peer may be gone, or its socket full, or TLS has failed: it learns by the close.
        with contextlib.suppress(ssl.SSLError, OSError, ValueError):
            self._ssl.unwrap()
        with contextlib.suppress(OSError):
            self._drain()


def _sentence(error: ssl.SSLError) -> str:
    if isinstance(error, ssl.SSLEOFError | ssl.SSLZeroReturnError):
        return "the peer has hung up (does it trust our certificate, and is the name right?)"
    reason = str(error.reason or error)
    sentence = _SENTENCES.get(reason, reason.lower().replace("_", " "))
    detail = getattr(error, "verify_message", "")
    return f"{sentence}: {detail}" if detail else sentence


def _error_of(reason: str) -> TlsError:
    """The error of compiled code; `reason` is OpenSSL's text, or a sentence of ours."""
    key = reason.upper().replace(" ", "_").replace("SSL/TLS_ALERT", "SSLV3_ALERT")
    return TlsError(_SENTENCES.get(key, reason))
