# SPDX-License-Identifier: Apache-2.0
"""The client side of the handshake: from the greeting to the transmission phase.

Theory of operation. The caller passes what it receives to `receive_data`, which takes any
bytes and never raises, and sends what `data_to_send` returns, until `negotiated` or `error`
is set. At the end of the stream it calls `receive_eof`, because a server can refuse
an EXPORT_NAME only by closing the connection: `error` says so then.

One option is under way at a time, in this order. Each may be left out:

    STARTTLS           if TLS is wanted; refused, for any reason: give up. See below
    EXTENDED_HEADERS   refused: go on with compact headers. Otherwise STRUCTURED_REPLY is left out
    STRUCTURED_REPLY   refused: go on with simple replies, and without metadata contexts
    SET_META_CONTEXT   refused: go on without metadata contexts
    GO                 ERR_UNSUP: go on with EXPORT_NAME, unless there are extended headers; any other error: give up
    EXPORT_NAME        at once, if the server does not speak fixed newstyle

TLS. A client that wants TLS is not talked out of it: its first option is STARTTLS, and no name of an export leaves in
plaintext, also if the server refuses STARTTLS. After the acknowledgement `starts_tls` is set: the caller starts TLS on the
connection, calls `tls_started`, and passes decrypted bytes from then on. Bytes behind the acknowledgement come from
somebody who sits on the wire, and end the handshake.

ERR_TLS_REQD and ERR_SHUTDOWN end the handshake as the answer to any option. Giving up is a soft
disconnect as proto.md defines it: ABORT is queued, the caller sends it and closes. If the
server broke the protocol, or understands only EXPORT_NAME, nothing is sent.

Bounds: one reply has at most `reply_length_max` bytes, and one option at most
`replies_max` replies. Not supported: the oldstyle handshake.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from nbdtarget_protocol.consts import (
    BASE_ALLOCATION,
    BLOCK_SIZE_MIN_DEFAULT,
    BLOCK_SIZE_PREFERRED_DEFAULT,
    CLIENT_FLAGS,
    CLISERV_MAGIC,
    EXPORT,
    EXPORT_NAME_ZEROES,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    INFO_NAMES,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_NAMES,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    PAYLOAD_MAX_DEFAULT,
    REP_ACK,
    REP_ERR_BLOCK_SIZE_REQD,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_FLAG_ERROR,
    REP_INFO,
    REP_META_CONTEXT,
    REP_NAMES,
    SIZE_MAX,
    U16,
    U32,
    U64,
)
from nbdtarget_protocol.errors import HandshakeError
from nbdtarget_protocol.options import (
    encode_info_request,
    encode_meta_context_request,
    encode_option,
    is_export_name,
    printable,
)

__all__ = ["ClientHandshake", "ClientNegotiated"]

REPLY_LENGTH_MAX: Final = 64 << 10
REPLIES_MAX: Final = 1000


@dataclass(frozen=True, slots=True)
class ClientNegotiated:
    """The result of a handshake.

    Args:
        size: bytes.
        flags: transmission flags.
        structured: replies are structured; they are with extended headers, too.
        contexts: (context id, name) of each metadata context selected.
        extended: requests and replies have headers of 32 bytes.
        block_size_min, block_size_preferred, payload_max: bytes; proto.md's defaults if the
            server advertised none. payload_max may be 2**32 - 1: no limit.
    """

    export_name: str
    size: int
    flags: int
    structured: bool
    contexts: tuple[tuple[int, str], ...] = ()
    block_size_min: int = BLOCK_SIZE_MIN_DEFAULT
    block_size_preferred: int = BLOCK_SIZE_PREFERRED_DEFAULT
    payload_max: int = PAYLOAD_MAX_DEFAULT
    extended: bool = False

    def __post_init__(self) -> None:
        assert self.structured or not self.extended


class ClientHandshake:
    """One connection's handshake; see the module head.

    Args:
        want_structured: ask for structured replies; without it, also not for extended headers and contexts.
        want_extended: ask for extended headers.

    Attributes:
        negotiated: set when the transmission phase begins.
        error: set when there will be none; send what is queued and close.
        has_hung_up: the error is that the server has hung up, without a word.
        starts_tls: the caller must start TLS, and call `tls_started` then.
    """

    def __init__(
        self,
        export_name: str,
        *,
        want_tls: bool = False,
        want_structured: bool = True,
        want_extended: bool = True,
        want_contexts: Sequence[str] = (BASE_ALLOCATION,),
        want_block_size: bool = True,
        reply_length_max: int = REPLY_LENGTH_MAX,
        replies_max: int = REPLIES_MAX,
    ) -> None:
        assert is_export_name(export_name)
        self.export_name = export_name
        self.want_tls = want_tls
        self.starts_tls = False
        self.want_structured = want_structured
        self.want_extended = want_extended
        self.want_contexts = tuple(want_contexts)
        self.want_block_size = want_block_size
        self.reply_length_max = reply_length_max
        self.replies_max = replies_max
        self.negotiated: ClientNegotiated | None = None
        self.error: HandshakeError | None = None
        self.has_hung_up = False
        self.structured = False
        self.extended = False
        self._no_zeroes = False
        self._contexts: dict[int, str] = {}
        self._export: tuple[int, int] | None = None  # size, flags
        self._block_sizes = (
            BLOCK_SIZE_MIN_DEFAULT,
            BLOCK_SIZE_PREFERRED_DEFAULT,
            PAYLOAD_MAX_DEFAULT,
        )
        self._option = 0  # under way
        self._nr_replies = 0  # of the option under way
        self._buffer = bytearray()
        self._output: list[bytes] = []
        # A function, and not a bound method: that would be a circle of references.
        self._step: Callable[[ClientHandshake], bool] = ClientHandshake._step_greeting

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the server sent, which may be any bytes. Never raises."""
        if self.error is not None:
            return
        self._buffer += data
        try:
            if self.starts_tls and data:
                raise _plaintext_error(len(data))
            while (
                self.negotiated is None
                and self.error is None
                and not self.starts_tls
                and self._step(self)
            ):
                pass
        except HandshakeError as error:
            self.error = error
        if self.error is not None:
            self._buffer.clear()

    def receive_eof(self) -> None:
        """Take the end of the stream: an error, unless the handshake was over."""
        if self.negotiated is not None or self.error is not None:
            return
        self.has_hung_up = True
        if self.starts_tls:
            self.error = HandshakeError("server hung up during the TLS handshake")
        elif self._option == OPT_EXPORT_NAME:
            self.error = HandshakeError(
                f"server has no export {self.export_name!r}, or requires TLS:"
                " it hung up when asked for it"
            )
        elif self._option:
            self.error = HandshakeError(
                f"server hung up during option {OPT_NAMES[self._option]}"
            )
        else:
            self.error = HandshakeError("server hung up before its greeting was whole")

    def data_to_send(self) -> list[bytes]:
        """Return the bytes to send, and forget them."""
        output = self._output
        self._output = []
        return output

    def tls_started(self) -> None:
        """Bytes that are passed to `receive_data` from now on have come through TLS; queued bytes leave through it."""
        assert self.starts_tls
        assert not self._buffer, "plaintext would count as encrypted"
        self.starts_tls = False
        self._begin_options()

    def trailing_data(self) -> bytes:
        """Return the bytes that came after the handshake, and forget them."""
        if self.negotiated is None:
            return b""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    # Steps: each takes one message from the buffer, or returns False to wait for more.

    def _step_greeting(self) -> bool:
        # Another kind of server may send fewer bytes than a greeting, and wait for the client.
        start = bytes(self._buffer[:8])
        if start != U64.pack(NBDMAGIC)[: len(start)]:
            raise HandshakeError("this is not an NBD server: no NBDMAGIC")
        if len(self._buffer) < 16:
            return False
        magic = U64.unpack_from(self._buffer, 8)[0]
        if magic == CLISERV_MAGIC:
            raise HandshakeError("server speaks only the oldstyle negotiation")
        if magic != IHAVEOPT:
            raise HandshakeError(f"bad greeting: {magic:#x} instead of IHAVEOPT")
        if len(self._buffer) < GREETING.size:
            return False
        flags = GREETING.unpack_from(self._buffer)[2]
        del self._buffer[: GREETING.size]
        fixed = bool(flags & FLAG_FIXED_NEWSTYLE)
        self._no_zeroes = bool(flags & FLAG_NO_ZEROES)
        answer = (FLAG_C_FIXED_NEWSTYLE if fixed else 0) | (
            FLAG_C_NO_ZEROES if self._no_zeroes else 0
        )
        if self.want_tls and not fixed:
            raise HandshakeError(
                "server has no TLS: it does not speak fixed newstyle, which STARTTLS needs"
            )
        self._output.append(CLIENT_FLAGS.pack(answer))
        if self.want_tls:
            self._send(OPT_STARTTLS)
            self._step = ClientHandshake._step_reply
        elif not fixed:
            self._send_export_name()
        else:
            self._begin_options()
        return True

    def _begin_options(self) -> None:
        if self.want_structured:
            extended = OPT_EXTENDED_HEADERS
            self._send(extended if self.want_extended else OPT_STRUCTURED_REPLY)
            self._step = ClientHandshake._step_reply
        else:
            self._send_go()

    def _step_export_name(self) -> bool:
        needed = EXPORT.size + (0 if self._no_zeroes else EXPORT_NAME_ZEROES)
        if len(self._buffer) < needed:
            return False
        size, flags = EXPORT.unpack_from(self._buffer)
        del self._buffer[:needed]
        self._negotiate(size, flags)
        return True

    def _step_reply(self) -> bool:
        if len(self._buffer) < OPTION_REPLY.size:
            return False
        magic, option, rep, length = OPTION_REPLY.unpack_from(self._buffer)
        if magic != OPTION_REPLY_MAGIC:
            raise HandshakeError(f"bad option reply magic {magic:#x}")
        if option != self._option:
            raise HandshakeError(
                f"reply to option {option} while {OPT_NAMES[self._option]} is under way"
            )
        if length > self.reply_length_max:
            raise HandshakeError(f"option reply of {length} bytes")
        end = OPTION_REPLY.size + length
        if len(self._buffer) < end:
            return False
        data = bytes(memoryview(self._buffer)[OPTION_REPLY.size : end])
        del self._buffer[:end]
        self._nr_replies += 1
        if self._nr_replies > self.replies_max:
            raise HandshakeError(f"more than {self.replies_max} replies to one option")
        if rep & REP_FLAG_ERROR:
            self._handle_error(rep, printable(data))
        else:
            self._handle_reply(rep, data)
        return True

    # Replies.

    def _handle_reply(self, rep: int, data: bytes) -> None:
        option = self._option
        if rep == REP_ACK:
            if data:
                raise HandshakeError("ACK with a payload")
            self._option_done()
        elif rep == REP_META_CONTEXT and option == OPT_SET_META_CONTEXT:
            self._handle_meta_context(data)
        elif rep == REP_INFO and option == OPT_GO:
            self._handle_info(data)
        else:
            shown = REP_NAMES.get(rep, str(rep))
            raise HandshakeError(f"reply {shown} to option {OPT_NAMES[option]}")

    def _option_done(self) -> None:
        if self._option == OPT_STARTTLS:
            if self._buffer:
                raise _plaintext_error(len(self._buffer))
            self.starts_tls = True
            return
        if self._option in (OPT_EXTENDED_HEADERS, OPT_STRUCTURED_REPLY):
            self.structured = True
            self.extended = self._option == OPT_EXTENDED_HEADERS
            if self.want_contexts:
                payload = encode_meta_context_request(
                    self.export_name, self.want_contexts
                )
                self._send(OPT_SET_META_CONTEXT, payload)
                return
        if self._option == OPT_GO:
            if self._export is None:
                raise HandshakeError("GO acknowledged without INFO_EXPORT")
            self._negotiate(*self._export)
            return
        self._send_go()

    def _handle_meta_context(self, data: bytes) -> None:
        if len(data) < 4:
            raise HandshakeError("META_CONTEXT reply is too short")
        context_id = U32.unpack_from(data)[0]
        name = printable(data[4:])
        if context_id in self._contexts:
            raise HandshakeError(f"metadata context id {context_id} given twice")
        if name not in self.want_contexts or name in self._contexts.values():
            raise HandshakeError(f"metadata context {name!r} was not asked for")
        self._contexts[context_id] = name

    def _handle_info(self, data: bytes) -> None:
        if len(data) < 2:
            raise HandshakeError("INFO reply is too short")
        info = U16.unpack_from(data)[0]
        layout = {
            INFO_EXPORT: INFO_EXPORT_PAYLOAD,
            INFO_BLOCK_SIZE: INFO_BLOCK_SIZE_PAYLOAD,
        }.get(info)
        if layout is None:
            return  # not asked for, or not known
        if len(data) != layout.size:
            raise HandshakeError(f"INFO_{INFO_NAMES[info]} of {len(data)} bytes")
        if info == INFO_EXPORT:
            _, size, flags = layout.unpack(data)
            self._export = size, flags
        elif self.want_block_size:
            _, minimum, preferred, payload_max = layout.unpack(data)
            self._block_sizes = _checked_block_sizes(minimum, preferred, payload_max)

    def _handle_error(self, rep: int, message: str) -> None:
        option = self._option
        fatal = rep in (REP_ERR_TLS_REQD, REP_ERR_SHUTDOWN)
        if option == OPT_EXTENDED_HEADERS and not fatal:
            self._send(OPT_STRUCTURED_REPLY)
        elif option == OPT_STRUCTURED_REPLY and not fatal:
            self._send_go()
        elif option == OPT_SET_META_CONTEXT and not fatal:
            self._contexts.clear()  # contexts that were sent before the error do not count
            self._send_go()
        elif option == OPT_GO and rep == REP_ERR_UNSUP and not self.extended:
            self._send_export_name()
        else:
            self._give_up(rep, message)

    def _give_up(self, rep: int, message: str) -> None:
        if self._option == OPT_STARTTLS and rep in (REP_ERR_UNSUP, REP_ERR_POLICY):
            sentence: str | None = "server has no TLS, and this connection demands it"
        else:
            sentence = self._maybe_sentence(rep)
        if sentence is None:
            shown = REP_NAMES.get(rep, hex(rep))
            sentence = f"server refused option {OPT_NAMES[self._option]} with {shown}"
        self.error = HandshakeError(f"{sentence}: {message}" if message else sentence)
        self._send(OPT_ABORT)

    def _maybe_sentence(self, rep: int) -> str | None:
        return {
            REP_ERR_TLS_REQD: "server requires TLS",
            REP_ERR_SHUTDOWN: "server is shutting down",
            REP_ERR_UNKNOWN: f"server has no export {self.export_name!r}",
            REP_ERR_POLICY: f"server does not allow export {self.export_name!r}",
            REP_ERR_BLOCK_SIZE_REQD: "server requires clients to ask for block sizes",
            REP_ERR_EXT_HEADER_REQD: "server requires extended headers",
        }.get(rep)

    # Requests.

    def _send(self, option: int, data: bytes = b"") -> None:
        self._option = option
        self._nr_replies = 0
        self._output.append(encode_option(option, data))

    def _send_go(self) -> None:
        infos = (INFO_BLOCK_SIZE,) if self.want_block_size else ()
        self._send(OPT_GO, encode_info_request(self.export_name, infos))
        self._step = ClientHandshake._step_reply

    def _send_export_name(self) -> None:
        self._send(OPT_EXPORT_NAME, self.export_name.encode())
        self._step = ClientHandshake._step_export_name

    def _negotiate(self, size: int, flags: int) -> None:
        if size > SIZE_MAX:
            raise HandshakeError(f"export size {size} is out of range")
        if not flags & FLAG_HAS_FLAGS:
            flags = 0  # then no other bit means anything
        minimum, preferred, payload_max = self._block_sizes
        self.negotiated = ClientNegotiated(
            self.export_name,
            size,
            flags,
            self.structured,
            tuple(self._contexts.items()),
            minimum,
            preferred,
            payload_max,
            self.extended,
        )


def _plaintext_error(nr_bytes: int) -> HandshakeError:
    return HandshakeError(
        f"{nr_bytes} bytes of plaintext came behind the answer to STARTTLS: somebody may"
        " sit on the wire"
    )


def _checked_block_sizes(
    minimum: int, preferred: int, payload_max: int
) -> tuple[int, int, int]:
    """Check what INFO_BLOCK_SIZE said.

    Only the minimum can make our requests wrong, so nonsense there ends the handshake; the
    others are hints, and nonsense is replaced.
    """
    if not 1 <= minimum <= 65536 or minimum & (minimum - 1):
        raise HandshakeError(f"server advertised a minimum block size of {minimum}")
    if preferred < minimum or preferred & (preferred - 1):
        preferred = max(minimum, BLOCK_SIZE_PREFERRED_DEFAULT)
    if payload_max < minimum:
        payload_max = PAYLOAD_MAX_DEFAULT
    return minimum, preferred, payload_max
