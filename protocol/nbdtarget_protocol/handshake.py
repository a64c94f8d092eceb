# SPDX-License-Identifier: Apache-2.0
"""The server side of the handshake: bytes in, bytes out, and what was negotiated.

Theory of operation. The caller constructs a `ServerHandshake`, sends what `data_to_send`
returns (the greeting is there at once), passes what it receives to `receive_data`, and sends again
after each call. `receive_data` takes any bytes and never raises.

    state         bytes it waits for        next
    client flags  4                         option; closed on an unknown flag
    option        16: magic, number, length payload, or swallow if the payload is unwanted
    payload       the option's length       option; transmission; closed
    swallow       the rest of a payload     option, answered with the error decided before
    TLS           none: the caller must     option, after `tls_started`; closed if plaintext comes
                  start TLS first
    transmission  none: further bytes are kept for `trailing_data`
    closed        none: further bytes are dropped

Ends. `negotiated` is set by GO and EXPORT_NAME. `closed` is set by ABORT, and together with
`error` when the client broke the protocol in a way that cannot be answered. The caller then sends
what is queued and closes the connection.

TLS. STARTTLS is acknowledged if `tls` is not OFF; then `starts_tls` is set. The caller sends what is queued, in
plaintext, starts TLS on the same connection, and calls `tls_started`. From then on it passes decrypted bytes. An attacker
on the wire can send options in front of the client's own STARTTLS, and bytes behind it. So nothing that was negotiated
before holds afterwards, and a client whose STARTTLS has bytes behind it is disconnected: it has to wait for the
acknowledgement. With REQUIRE, STARTTLS and ABORT are the only options that are answered before; any other one, known or
not, gets ERR_TLS_REQD, and EXPORT_NAME, which has no error reply, ends the connection. For a client that has not answered that it
speaks fixed newstyle there is no TLS, as proto.md demands: its STARTTLS gets ERR_POLICY, and so do its other options with REQUIRE.

How long something stays negotiated: structured replies and extended headers stay once they are acknowledged. Extended
headers include structured replies, so STRUCTURED_REPLY is refused after them, and an EXPORT_NAME, which the standard
forbids then, ends the connection. Asking for the same again is acknowledged again, and changes nothing. Metadata
contexts belong to the export name that SET_META_CONTEXT gave. Each further SET_META_CONTEXT first clears them,
also when it fails, and a GO for another name ends without contexts.

Metadata contexts. An export offers a list of names; a context's id is its place in that list,
from 1. LIST shows those that a query names, by its whole name or by its namespace alone
(`base:`), and all of them if there is no query. SET selects by whole name only, as proto.md
recommends: a namespace alone, an unknown one, or no query at all, select nothing. Both answer
in the export's order, and each context once, however often it was asked for.

Bounds. Only the payloads of options that are understood are buffered, to
`option_length_max`. Longer payloads are dropped and answered with ERR_TOO_BIG, and above
`option_swallow_max` the connection ends. `options_max` ends the handshake of a client that sends options
for ever; a time limit for a slow client is the caller's task, because there is no clock here. Replies that are
queued or were ever sent count against `output_max`. A LIST that would go beyond it ends with
ERR_TOO_BIG, and the connection of a client that asks for twice as much is closed, so that answers take a
bounded amount of memory even if the client reads none of them.

Not supported: the oldstyle handshake.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import Enum
from typing import Final, Protocol

from nbdtarget_protocol.consts import (
    BASE_ALLOCATION,
    BLOCK_SIZE_MIN_DEFAULT,
    BLOCK_SIZE_PREFERRED_DEFAULT,
    CLIENT_FLAGS,
    EXPORT,
    FLAG_BLOCK_STATUS_PAYLOAD,
    FLAG_C_FIXED_NEWSTYLE,
    FLAG_C_NO_ZEROES,
    FLAG_FIXED_NEWSTYLE,
    FLAG_HAS_FLAGS,
    FLAG_NO_ZEROES,
    FLAG_SEND_DF,
    FLAG_SEND_FAST_ZERO,
    FLAG_SEND_WRITE_ZEROES,
    GREETING,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_DESCRIPTION,
    INFO_NAME,
    NBDMAGIC,
    OPT_ABORT,
    OPT_EXPORT_NAME,
    OPT_EXTENDED_HEADERS,
    OPT_GO,
    OPT_INFO,
    OPT_LIST,
    OPT_LIST_META_CONTEXT,
    OPT_NAMES,
    OPT_SET_META_CONTEXT,
    OPT_STARTTLS,
    OPT_STRUCTURED_REPLY,
    OPTION,
    PAYLOAD_MAX_DEFAULT,
    REP_ACK,
    REP_ERR_EXT_HEADER_REQD,
    REP_ERR_INVALID,
    REP_ERR_POLICY,
    REP_ERR_SHUTDOWN,
    REP_ERR_TLS_REQD,
    REP_ERR_TOO_BIG,
    REP_ERR_UNKNOWN,
    REP_ERR_UNSUP,
    REP_INFO,
    REP_META_CONTEXT,
    REP_SERVER,
    SIZE_MAX,
    STRING_MAX,
)
from nbdtarget_protocol.errors import HandshakeError, OptionError
from nbdtarget_protocol.options import (
    ZEROES,
    clip_string,
    decode_info_request,
    decode_meta_context_request,
    decode_name,
    encode_info_block_size,
    encode_info_description,
    encode_info_export,
    encode_info_name,
    encode_meta_context,
    encode_option_reply,
    encode_server,
    is_context_name,
    is_export_name,
)

__all__ = [
    "CONTEXTS_MAX",
    "ExportInfo",
    "Exports",
    "Negotiated",
    "ServerHandshake",
    "TlsMode",
]

# Enough for a GO that asks for every one of the 65 536 information types.
OPTION_LENGTH_MAX: Final = 256 << 10
# A payload up to 32 MiB is not an attack (proto.md, "Size constraints"), so it is received and dropped.
OPTION_SWALLOW_MAX: Final = 32 << 20
OPTIONS_MAX: Final = 4096
QUERIES_MAX: Final = 1024
LIST_MAX: Final = 10_000
OUTPUT_MAX: Final = 16 << 20

CONTEXTS_MAX: Final = 16  # metadata contexts that one export may offer


class TlsMode(Enum):
    """Whether a server has TLS, and so how it answers STARTTLS."""

    OFF = "off"  # there is no TLS
    ON = "on"  # clients may use it
    REQUIRE = "require"  # clients must use it


@dataclass(frozen=True, slots=True)
class ExportInfo:
    """The facts about an export that the handshake sends.

    Args:
        name: the canonical name.
        size: bytes, below 2**63.
        flags: transmission flags. HAS_FLAGS is added, and SEND_DF and BLOCK_STATUS_PAYLOAD where they may stand.
        description: for people; may be empty.
        block_size_min, block_size_preferred, payload_max: bytes, as advertised.
        contexts: names of the metadata contexts that a client may select, each once.
    """

    name: str
    size: int
    flags: int
    description: str = ""
    block_size_min: int = BLOCK_SIZE_MIN_DEFAULT
    block_size_preferred: int = BLOCK_SIZE_PREFERRED_DEFAULT
    payload_max: int = PAYLOAD_MAX_DEFAULT
    contexts: tuple[str, ...] = (BASE_ALLOCATION,)

    def __post_init__(self) -> None:
        minimum, preferred = self.block_size_min, self.block_size_preferred
        assert is_export_name(self.name), "export name cannot be sent"
        assert 0 <= self.size <= SIZE_MAX, "export size out of range"
        assert 1 <= minimum <= 65536, "minimum block size out of range"
        assert minimum & (minimum - 1) == 0, "minimum block size: no power of two"
        assert preferred >= max(minimum, 512), "preferred block size out of range"
        assert preferred & (preferred - 1) == 0, "preferred block size: no power of two"
        assert preferred <= self.payload_max < 1 << 32, "payload_max out of range"
        added = FLAG_SEND_DF | FLAG_BLOCK_STATUS_PAYLOAD
        assert not self.flags & added, "SEND_DF is the handshake's to set"
        assert (
            not self.flags & FLAG_SEND_FAST_ZERO or self.flags & FLAG_SEND_WRITE_ZEROES
        ), "SEND_FAST_ZERO without SEND_WRITE_ZEROES"
        names = self.contexts
        assert len(names) == len(set(names)) <= CONTEXTS_MAX, "contexts: many or twice"
        assert all(map(is_context_name, names)), "context name cannot be sent"


class Exports(Protocol):
    """The methods of the owner of the exports that the handshake calls. No other exceptions than those named here are raised."""

    def lookup(self, name: str) -> ExportInfo | None:
        """Return the export of that name; "" is the default export, if there is one.

        Raises: OptionError: the export exists but cannot be served now; the client is told why.
        """
        ...

    def names(self) -> Iterable[tuple[str, str]]:
        """Return name and description of what LIST shows; iterated lazily."""
        ...


@dataclass(frozen=True, slots=True)
class Negotiated:
    """The result of a handshake.

    Args:
        structured: replies are structured; they are with extended headers, too.
        contexts: (context id, name) of each metadata context selected, in the export's order.
        extended: requests and replies have headers of 32 bytes.
    """

    export: ExportInfo
    structured: bool
    contexts: tuple[tuple[int, str], ...] = ()
    extended: bool = False

    def __post_init__(self) -> None:
        assert self.structured or not self.extended

    @property
    def flags(self) -> int:
        """The transmission flags as GO tells them."""
        flags = self.export.flags | FLAG_HAS_FLAGS
        if self.structured:
            flags |= FLAG_SEND_DF
        if self.extended and self.contexts:
            flags |= FLAG_BLOCK_STATUS_PAYLOAD
        return flags


class ServerHandshake:
    """One connection's handshake; see the module head.

    Attributes:
        negotiated: set when the transmission phase begins.
        closed: nothing more is read or answered; send what is queued and close.
        error: why, if it was not the client's wish.
        starts_tls: the caller must start TLS, and call `tls_started` then.
        lacks_tls: options were refused because TLS has to be started first, and it has not been so far.
        is_encrypted: `tls_started` was called.
    """

    def __init__(
        self,
        exports: Exports,
        *,
        tls: TlsMode = TlsMode.OFF,
        option_length_max: int = OPTION_LENGTH_MAX,
        option_swallow_max: int = OPTION_SWALLOW_MAX,
        options_max: int = OPTIONS_MAX,
        queries_max: int = QUERIES_MAX,
        list_max: int = LIST_MAX,
        output_max: int = OUTPUT_MAX,
    ) -> None:
        self.exports = exports
        self.tls = tls
        self.starts_tls = False
        self.lacks_tls = False
        self.is_encrypted = False
        self.option_length_max = option_length_max
        self.option_swallow_max = option_swallow_max
        self.options_max = options_max
        self.queries_max = queries_max
        self.list_max = list_max
        self.output_max = output_max
        self.negotiated: Negotiated | None = None
        self.closed = False
        self.error: HandshakeError | None = None
        self.structured = False
        self.extended = False
        self.no_zeroes = False
        self._is_fixed = False  # the client has said that it speaks fixed newstyle
        self.shutting_down = False
        self.nr_options = 0
        self._buffer = bytearray()
        self._swallow = 0  # bytes of an unwanted payload still to come
        self._swallowed: tuple[int, OptionError] | None = (
            None  # answered when they came
        )
        # A function, and not a bound method: that would be a circle of references.
        self._step: Callable[[ServerHandshake], bool] = (
            ServerHandshake._step_client_flags
        )
        self._contexts: tuple[tuple[int, str], ...] = ()
        self._contexts_name = ""  # the export that _contexts belong to
        self._output: list[bytes] = []
        self._output_total = 0
        self._send(
            GREETING.pack(NBDMAGIC, IHAVEOPT, FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES)
        )

    def receive_data(self, data: bytes | bytearray | memoryview) -> None:
        """Take what the client sent, which may be any bytes. Never raises."""
        if self.closed:
            return
        if self.starts_tls and data:
            self._fail_plaintext(len(data))
        self._buffer += data
        while (
            not (self.closed or self.starts_tls)
            and self.negotiated is None
            and self._step(self)
        ):
            pass
        if self.closed:
            self._buffer.clear()

    def data_to_send(self) -> list[bytes]:
        """Return the bytes to send, and forget them."""
        output = self._output
        self._output = []
        return output

    def tls_started(self) -> None:
        """Bytes that are passed to `receive_data` from now on have come through TLS. Earlier options are forgotten."""
        assert self.starts_tls
        assert not self._buffer, "plaintext would count as encrypted"
        self.starts_tls = False
        self.is_encrypted = True
        self.structured = self.extended = False
        self._contexts = ()
        self._contexts_name = ""

    def trailing_data(self) -> bytes:
        """Return the bytes that came after the handshake, and forget them."""
        if self.negotiated is None:
            return b""
        data = bytes(self._buffer)
        self._buffer.clear()
        return data

    def shutdown(self) -> None:
        """From now on answer every option but ABORT with ERR_SHUTDOWN."""
        self.shutting_down = True

    # Steps: each takes one message from the buffer, or returns False to wait for more.

    def _step_client_flags(self) -> bool:
        if len(self._buffer) < CLIENT_FLAGS.size:
            return False
        flags = CLIENT_FLAGS.unpack_from(self._buffer)[0]
        del self._buffer[: CLIENT_FLAGS.size]
        # A client without C_FIXED_NEWSTYLE is served like any other, but for TLS: either it only ever
        # sends EXPORT_NAME, or it forgot the flag.
        if flags & ~(FLAG_C_FIXED_NEWSTYLE | FLAG_C_NO_ZEROES):
            self._fail(f"unknown client flags {flags:#x}")
        self.no_zeroes = bool(flags & FLAG_C_NO_ZEROES)
        self._is_fixed = bool(flags & FLAG_C_FIXED_NEWSTYLE)
        self._step = ServerHandshake._step_option
        return True

    def _step_option(self) -> bool:
        if len(self._buffer) < OPTION.size:
            return False
        magic, option, length = OPTION.unpack_from(self._buffer)
        if magic != IHAVEOPT:
            self._fail(f"bad option magic {magic:#x}")
            return False
        refusal = self._refuse_by_header(option, length)
        if self.closed:
            return False
        if refusal is None:
            end = OPTION.size + length
            if len(self._buffer) < end:
                return False
            data = bytes(memoryview(self._buffer)[OPTION.size : end])
            del self._buffer[:end]
            self.nr_options += 1
            self._handle_option(option, data)
        else:
            del self._buffer[: OPTION.size]
            self.nr_options += 1
            self._swallow = length
            self._swallowed = (option, refusal)
            self._step = ServerHandshake._step_swallow
        return True

    def _step_swallow(self) -> bool:
        taken = min(self._swallow, len(self._buffer))
        del self._buffer[:taken]
        self._swallow -= taken
        if self._swallow:
            return False
        assert self._swallowed is not None
        option, refusal = self._swallowed
        self._swallowed = None
        self._step = ServerHandshake._step_option
        self._end_swallowed(option, refusal)
        return True

    def _end_swallowed(self, option: int, refusal: OptionError) -> None:
        if option == OPT_ABORT:
            self._handle_abort(b"")
            return
        if self.shutting_down and refusal.rep != REP_ERR_TLS_REQD:
            refusal = _is_shutting_down()
        self._refuse(option, refusal)

    @property
    def has_asked_too_much(self) -> bool:
        """Whether the answers to its options were more than `output_max`."""
        return self._output_total > self.output_max

    def _refuse_by_header(self, option: int, length: int) -> OptionError | None:
        """Decide, before its payload came, whether to take `option` at all.

        Returns: what to answer once the payload is swallowed; None to buffer and handle it.
        """
        if self.nr_options >= self.options_max:
            self._fail(f"more than {self.options_max} options")
            return None
        if self._output_total > 2 * self.output_max:
            self._fail(f"asked for more than {2 * self.output_max} bytes of answers")
            return None
        if length > self.option_swallow_max:
            self._fail(f"option {_name(option)} with a payload of {length} bytes")
            return None
        if (
            self.tls is TlsMode.REQUIRE
            and not self.is_encrypted
            and option not in (OPT_STARTTLS, OPT_ABORT)
        ):
            self.lacks_tls = True
            if option == OPT_EXPORT_NAME:  # has no error reply
                self._fail("EXPORT_NAME refused: this server requires TLS")
                return None
            if not self._is_fixed:
                return _no_tls_without_fixed_newstyle()
            return OptionError(
                REP_ERR_TLS_REQD, "this server requires TLS: begin with STARTTLS"
            )
        if option == OPT_SET_META_CONTEXT:
            self._contexts = ()  # replaced even if this one fails
        if option == OPT_EXPORT_NAME:
            if length > STRING_MAX:
                self._fail("export name is longer than 4096 bytes")
            return None
        if option not in _HANDLERS:
            return OptionError(REP_ERR_UNSUP, f"option {_name(option)} is not known")
        if option in _WITHOUT_PAYLOAD and length:
            return OptionError(REP_ERR_INVALID, f"{_name(option)} takes no payload")
        if length > self.option_length_max:
            return OptionError(
                REP_ERR_TOO_BIG, f"payload is longer than {self.option_length_max}"
            )
        return None

    # Options. Each handler answers by itself, or raises OptionError.

    def _handle_option(self, option: int, data: bytes) -> None:
        try:
            if self.shutting_down and option != OPT_ABORT:
                raise _is_shutting_down()
            _HANDLERS[option](self, data)
        except OptionError as error:
            self._refuse(option, error)

    def _handle_export_name(self, data: bytes) -> None:
        if self.extended:
            raise OptionError(REP_ERR_INVALID, "extended headers were negotiated")
        name = decode_name(data)
        export = self._lookup(name)
        self._negotiate(name, export)
        assert self.negotiated is not None
        self._send(EXPORT.pack(export.size, self.negotiated.flags))
        if not self.no_zeroes:
            self._send(ZEROES)

    def _handle_abort(self, data: bytes) -> None:
        self._reply(OPT_ABORT, REP_ACK)
        self.closed = True

    def _handle_list(self, data: bytes) -> None:
        nr_listed = 0
        for name, description in self.exports.names():
            if not is_export_name(name):
                continue  # no client could ask for it
            if nr_listed == self.list_max:
                raise OptionError(
                    REP_ERR_TOO_BIG, f"there are more than {self.list_max} exports"
                )
            if self._output_total > self.output_max:
                raise OptionError(REP_ERR_TOO_BIG, "listed too much on one connection")
            self._reply(OPT_LIST, REP_SERVER, encode_server(name, description))
            nr_listed += 1
        self._reply(OPT_LIST, REP_ACK)

    def _handle_starttls(self, data: bytes) -> None:
        if self.tls is TlsMode.OFF:
            self._handle_unsupported(data)
        if self.is_encrypted:
            raise OptionError(REP_ERR_INVALID, "TLS has started already")
        if not self._is_fixed:
            raise _no_tls_without_fixed_newstyle()
        if self._buffer:
            self._fail_plaintext(len(self._buffer))
            return
        self._reply(OPT_STARTTLS, REP_ACK)
        self.starts_tls = True
        self.lacks_tls = False

    def _handle_unsupported(self, data: bytes) -> None:
        raise OptionError(REP_ERR_UNSUP, "not supported by this server")

    def _handle_info(self, data: bytes) -> None:
        self._answer_info(OPT_INFO, data)

    def _handle_go(self, data: bytes) -> None:
        name, export = self._answer_info(OPT_GO, data)
        self._negotiate(name, export)

    def _answer_info(self, option: int, data: bytes) -> tuple[str, ExportInfo]:
        name, infos = decode_info_request(data)
        export = self._lookup(name)
        flags = self._flags_told(option, name, export)
        self._reply(option, REP_INFO, encode_info_export(export.size, flags))
        if INFO_NAME in infos:
            self._reply(option, REP_INFO, encode_info_name(export.name))
        if INFO_DESCRIPTION in infos and export.description:
            self._reply(option, REP_INFO, encode_info_description(export.description))
        # Constraints that are enforced are sent also to clients that did not ask for them.
        if INFO_BLOCK_SIZE in infos or export.block_size_min > 1:
            info = encode_info_block_size(
                minimum=export.block_size_min,
                preferred=export.block_size_preferred,
                payload_max=export.payload_max,
            )
            self._reply(option, REP_INFO, info)
        self._reply(option, REP_ACK)
        return name, export

    def _flags_told(self, option: int, name: str, export: ExportInfo) -> int:
        """Return the transmission flags that INFO and GO tell.

        BLOCK_STATUS_PAYLOAD says nothing after GO without contexts. INFO tells it also to a client that has not
        selected any yet, because this is how it learns what GO would offer.
        """
        contexts = self._contexts_of(name)
        if option == OPT_INFO:
            contexts = contexts or tuple(enumerate(export.contexts, 1))
        return Negotiated(export, self.structured, contexts, self.extended).flags

    def _handle_structured_reply(self, data: bytes) -> None:
        if self.extended:
            raise OptionError(
                REP_ERR_EXT_HEADER_REQD, "extended headers were negotiated"
            )
        self.structured = True
        self._reply(OPT_STRUCTURED_REPLY, REP_ACK)

    def _handle_extended_headers(self, data: bytes) -> None:
        self.structured = self.extended = True
        self._reply(OPT_EXTENDED_HEADERS, REP_ACK)

    def _handle_list_meta_context(self, data: bytes) -> None:
        _, export, queries = self._meta_context_request(data)
        for name in export.contexts:
            namespace = name[: name.index(":") + 1]
            if not queries or {name.encode(), namespace.encode()} & queries:
                context = encode_meta_context(0, name)
                self._reply(OPT_LIST_META_CONTEXT, REP_META_CONTEXT, context)
        self._reply(OPT_LIST_META_CONTEXT, REP_ACK)

    def _handle_set_meta_context(self, data: bytes) -> None:
        name, export, queries = self._meta_context_request(data)
        # Unknown namespaces, unknown leaves and wildcards select nothing.
        self._contexts_name = name
        self._contexts = tuple(
            (context_id, context)
            for context_id, context in enumerate(export.contexts, 1)
            if context.encode() in queries
        )
        for context_id, context in self._contexts:
            selected = encode_meta_context(context_id, context)
            self._reply(OPT_SET_META_CONTEXT, REP_META_CONTEXT, selected)
        self._reply(OPT_SET_META_CONTEXT, REP_ACK)

    def _meta_context_request(self, data: bytes) -> tuple[str, ExportInfo, set[bytes]]:
        if not self.structured:
            needed = "STRUCTURED_REPLY or EXTENDED_HEADERS"
            raise OptionError(REP_ERR_INVALID, f"needs {needed} first")
        name, queries = decode_meta_context_request(data, self.queries_max)
        return name, self._lookup(name), set(queries)

    # Ends.

    def _lookup(self, name: str) -> ExportInfo:
        export = self.exports.lookup(name)
        if export is None:
            shown = f"export {name!r}" if name else "default export"
            raise OptionError(REP_ERR_UNKNOWN, f"no {shown}")
        return export

    def _negotiate(self, name: str, export: ExportInfo) -> None:
        contexts = self._contexts_of(name)
        self.negotiated = Negotiated(export, self.structured, contexts, self.extended)

    def _contexts_of(self, name: str) -> tuple[tuple[int, str], ...]:
        """Return the metadata contexts that are selected for the export that goes by this name."""
        return self._contexts if name == self._contexts_name else ()

    def _refuse(self, option: int, error: OptionError) -> None:
        if option == OPT_EXPORT_NAME:  # has no error reply
            self._fail(f"EXPORT_NAME refused: {error.message}")
            return
        self._reply(option, error.rep, clip_string(error.message))

    def _fail_plaintext(self, nr_bytes: int) -> None:
        self._fail(f"{nr_bytes} bytes of plaintext behind STARTTLS")

    def _fail(self, message: str) -> None:
        self.error = HandshakeError(message)
        self.closed = True

    def _reply(self, option: int, rep: int, data: bytes = b"") -> None:
        self._send(encode_option_reply(option, rep, data))

    def _send(self, data: bytes) -> None:
        self._output.append(data)
        self._output_total += len(data)


def _is_shutting_down() -> OptionError:
    return OptionError(REP_ERR_SHUTDOWN, "server is shutting down")


def _no_tls_without_fixed_newstyle() -> OptionError:
    reason = "TLS is only for clients that speak fixed newstyle"
    return OptionError(REP_ERR_POLICY, reason)


def _name(option: int) -> str:
    return OPT_NAMES.get(option, str(option))


_HANDLERS: Final[dict[int, Callable[[ServerHandshake, bytes], None]]] = {
    OPT_EXPORT_NAME: ServerHandshake._handle_export_name,
    OPT_ABORT: ServerHandshake._handle_abort,
    OPT_LIST: ServerHandshake._handle_list,
    OPT_STARTTLS: ServerHandshake._handle_starttls,
    OPT_INFO: ServerHandshake._handle_info,
    OPT_GO: ServerHandshake._handle_go,
    OPT_STRUCTURED_REPLY: ServerHandshake._handle_structured_reply,
    OPT_LIST_META_CONTEXT: ServerHandshake._handle_list_meta_context,
    OPT_SET_META_CONTEXT: ServerHandshake._handle_set_meta_context,
    OPT_EXTENDED_HEADERS: ServerHandshake._handle_extended_headers,
}

_WITHOUT_PAYLOAD: Final = frozenset(
    {OPT_LIST, OPT_STARTTLS, OPT_STRUCTURED_REPLY, OPT_EXTENDED_HEADERS}
)
