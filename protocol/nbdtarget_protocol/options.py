# SPDX-License-Identifier: Apache-2.0
"""The payloads of options and option replies: encoded and decoded, without any state.

A decoder raises `OptionError(REP_ERR_INVALID)` for every mistake of the client, and no other
exception, for any bytes.
"""

from collections.abc import Sequence

from nbdtarget_protocol.consts import (
    EXPORT_NAME_ZEROES,
    IHAVEOPT,
    INFO_BLOCK_SIZE,
    INFO_BLOCK_SIZE_PAYLOAD,
    INFO_DESCRIPTION,
    INFO_EXPORT,
    INFO_EXPORT_PAYLOAD,
    INFO_NAME,
    OPTION,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    REP_ERR_INVALID,
    REP_ERR_TOO_BIG,
    STRING_MAX,
    U16,
    U32,
)
from nbdtarget_protocol.errors import OptionError

__all__ = [
    "ZEROES",
    "clip_string",
    "decode_info_request",
    "decode_meta_context_request",
    "decode_name",
    "encode_info_block_size",
    "encode_info_description",
    "encode_info_export",
    "encode_info_name",
    "encode_info_request",
    "encode_meta_context",
    "encode_meta_context_request",
    "encode_option",
    "encode_option_reply",
    "encode_server",
    "is_context_name",
    "is_export_name",
    "printable",
]

ZEROES = bytes(EXPORT_NAME_ZEROES)


def encode_option(option: int, data: bytes = b"") -> bytes:
    """Encode an option as the client sends it."""
    return OPTION.pack(IHAVEOPT, option, len(data)) + data


def encode_option_reply(option: int, rep: int, data: bytes = b"") -> bytes:
    """Encode one reply to `option`."""
    return OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, rep, len(data)) + data


def clip_string(text: str) -> bytes:
    """Encode `text`, cut at a character so that it is at most STRING_MAX bytes long."""
    data = text.encode("utf-8", "replace")
    if len(data) <= STRING_MAX:
        return data
    return data[:STRING_MAX].decode("utf-8", "ignore").encode()


def printable(data: bytes | bytearray) -> str:
    """Decode text from the peer so that it can stand in one line of a terminal or log."""
    text = bytes(data[:STRING_MAX]).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text).strip()


def is_export_name(name: str) -> bool:
    """Tell whether `name` can stand on the wire: UTF-8, no NUL, at most 4096 bytes."""
    try:
        return "\0" not in name and len(name.encode()) <= STRING_MAX
    except (
        UnicodeEncodeError
    ):  # a lone surrogate, from a command line that is not UTF-8
        return False


def is_context_name(name: str) -> bool:
    """Tell whether `name` is a metadata context's: a namespace, a colon and a leaf."""
    namespace, _, leaf = name.partition(":")
    return (
        bool(namespace and leaf)
        and namespace.isprintable()
        and " " not in namespace
        and is_export_name(name)
    )


def decode_name(data: bytes) -> str:
    """Decode an export name. Raises: OptionError: too long, with a NUL, or not UTF-8."""
    if len(data) > STRING_MAX:
        raise OptionError(REP_ERR_INVALID, "export name is longer than 4096 bytes")
    if b"\0" in data:
        raise OptionError(REP_ERR_INVALID, "export name contains a NUL")
    try:
        return data.decode()
    except UnicodeDecodeError:
        raise OptionError(REP_ERR_INVALID, "export name is not UTF-8") from None


def encode_info_request(name: str, infos: Sequence[int]) -> bytes:
    """Encode the payload of INFO and GO."""
    encoded = name.encode()
    return b"".join(
        (
            U32.pack(len(encoded)),
            encoded,
            U16.pack(len(infos)),
            *map(U16.pack, infos),
        )
    )


def decode_info_request(data: bytes) -> tuple[str, frozenset[int]]:
    """Decode the payload of INFO and GO: the export name and the information types.

    A type that is asked for twice counts once: the client broke a rule that costs us nothing.
    Raises: OptionError.
    """
    if len(data) < 6:
        raise OptionError(REP_ERR_INVALID, "option is too short")
    name_end = 4 + U32.unpack_from(data)[0]
    if name_end > len(data) - 2:
        raise OptionError(REP_ERR_INVALID, "export name is longer than the option")
    name = decode_name(data[4:name_end])
    count = U16.unpack_from(data, name_end)[0]
    if len(data) != name_end + 2 + 2 * count:
        raise OptionError(
            REP_ERR_INVALID, "option length does not match the information requests"
        )
    infos = (U16.unpack_from(data, name_end + 2 + 2 * i)[0] for i in range(count))
    return name, frozenset(infos)


def encode_meta_context_request(name: str, queries: Sequence[str]) -> bytes:
    """Encode the payload of LIST_META_CONTEXT and SET_META_CONTEXT."""
    encoded = name.encode()
    parts = [U32.pack(len(encoded)), encoded, U32.pack(len(queries))]
    for query in queries:
        data = query.encode()
        parts += (U32.pack(len(data)), data)
    return b"".join(parts)


def decode_meta_context_request(
    data: bytes, queries_max: int
) -> tuple[str, list[bytes]]:
    """Decode the payload of LIST_META_CONTEXT and SET_META_CONTEXT: name and queries.

    Queries stay bytes: one that is not UTF-8 names no context that we have, no more.
    Raises: OptionError.
    """
    if len(data) < 8:
        raise OptionError(REP_ERR_INVALID, "option is too short")
    at = 4 + U32.unpack_from(data)[0]
    if at > len(data) - 4:
        raise OptionError(REP_ERR_INVALID, "export name is longer than the option")
    name = decode_name(data[4:at])
    count = U32.unpack_from(data, at)[0]
    at += 4
    if count > queries_max:
        raise OptionError(REP_ERR_TOO_BIG, f"more than {queries_max} queries")
    queries = []
    for _ in range(count):
        if at + 4 > len(data):
            raise OptionError(REP_ERR_INVALID, "option ends inside its queries")
        end = at + 4 + U32.unpack_from(data, at)[0]
        if end > len(data):
            raise OptionError(REP_ERR_INVALID, "query is longer than the option")
        if end - at - 4 > STRING_MAX:
            raise OptionError(REP_ERR_INVALID, "query is longer than 4096 bytes")
        queries.append(data[at + 4 : end])
        at = end
    if at != len(data):
        raise OptionError(REP_ERR_INVALID, "bytes left over after the queries")
    return name, queries


def encode_server(name: str, description: str) -> bytes:
    """Encode the payload of REP_SERVER: one export of a LIST."""
    encoded = name.encode()
    return U32.pack(len(encoded)) + encoded + clip_string(description)


def encode_info_export(size: int, flags: int) -> bytes:
    """Encode the payload of REP_INFO with INFO_EXPORT."""
    return INFO_EXPORT_PAYLOAD.pack(INFO_EXPORT, size, flags)


def encode_info_name(name: str) -> bytes:
    """Encode the payload of REP_INFO with INFO_NAME."""
    return U16.pack(INFO_NAME) + name.encode()


def encode_info_description(description: str) -> bytes:
    """Encode the payload of REP_INFO with INFO_DESCRIPTION."""
    return U16.pack(INFO_DESCRIPTION) + clip_string(description)


def encode_info_block_size(*, minimum: int, preferred: int, payload_max: int) -> bytes:
    """Encode the payload of REP_INFO with INFO_BLOCK_SIZE; all in bytes."""
    return INFO_BLOCK_SIZE_PAYLOAD.pack(
        INFO_BLOCK_SIZE, minimum, preferred, payload_max
    )


def encode_meta_context(context_id: int, name: str) -> bytes:
    """Encode the payload of REP_META_CONTEXT."""
    return U32.pack(context_id) + name.encode()
