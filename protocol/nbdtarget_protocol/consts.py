# SPDX-License-Identifier: Apache-2.0
"""The numbers of the NBD wire: the only place that has them.

Names are those of proto.md without `NBD_`. All are plain ints: comparing two ints costs a
tenth of comparing two IntEnums, and a whole request takes about 8 microseconds. The tables at
the end have the names for logs and messages.
"""

from struct import Struct
from typing import Final

# Magics.
NBDMAGIC: Final[int] = 0x4E42444D41474943
IHAVEOPT: Final[int] = 0x49484156454F5054
CLISERV_MAGIC: Final[int] = (
    0x00420281861253  # of the oldstyle handshake, which is refused
)
OPTION_REPLY_MAGIC: Final[int] = 0x0003E889045565A9
REQUEST_MAGIC: Final[int] = 0x25609513
SIMPLE_REPLY_MAGIC: Final[int] = 0x67446698
STRUCTURED_REPLY_MAGIC: Final[int] = 0x668E33EF
EXTENDED_REQUEST_MAGIC: Final[int] = 0x21E41C71
EXTENDED_REPLY_MAGIC: Final[int] = 0x6E8A278C

# Layouts. All integers are big-endian.
GREETING: Final = Struct(">QQH")  # NBDMAGIC, IHAVEOPT, handshake flags
CLIENT_FLAGS: Final = Struct(">I")
OPTION: Final = Struct(">QII")  # magic, option, length
OPTION_REPLY: Final = Struct(">QIII")  # magic, option, reply type, length
EXPORT: Final = Struct(">QH")  # size, transmission flags: the answer to EXPORT_NAME
INFO_EXPORT_PAYLOAD: Final = Struct(">HQH")  # type, size, transmission flags
INFO_BLOCK_SIZE_PAYLOAD: Final = Struct(">HIII")  # type, min, preferred, payload max
REQUEST: Final = Struct(">IHHQQI")  # magic, flags, type, cookie, offset, length
SIMPLE_REPLY: Final = Struct(">IIQ")  # magic, error, cookie
CHUNK: Final = Struct(">IHHQI")  # magic, flags, type, cookie, payload length
OFFSET_DATA: Final = Struct(">IHHQIQ")  # CHUNK, offset
OFFSET_HOLE: Final = Struct(">IHHQIQI")  # CHUNK, offset, hole size
EXTENDED_REQUEST: Final = Struct(">IHHQQQ")  # as REQUEST; the length has 64 bits
# magic, flags, type, cookie, offset of the request, payload length
EXTENDED_CHUNK: Final = Struct(">IHHQQQ")
EXTENDED_OFFSET_DATA: Final = Struct(">IHHQQQQ")  # EXTENDED_CHUNK, offset
EXTENDED_OFFSET_HOLE: Final = Struct(">IHHQQQQI")  # EXTENDED_CHUNK, offset, hole size
U16: Final = Struct(">H")
U32: Final = Struct(">I")
U64: Final = Struct(">Q")

EXPORT_NAME_ZEROES: Final[int] = (
    124  # bytes after EXPORT, unless NO_ZEROES on both sides
)
STRING_MAX: Final[int] = 4096  # bytes
EXTENTS_MAX: Final[int] = 1 << 20  # descriptors in one BLOCK_STATUS chunk
SIZE_MAX: Final[int] = (1 << 63) - 1  # no known peer goes above

# The size constraints where none were advertised.
BLOCK_SIZE_MIN_DEFAULT: Final[int] = 1
BLOCK_SIZE_PREFERRED_DEFAULT: Final[int] = 4096
PAYLOAD_MAX_DEFAULT: Final[int] = 32 << 20

# Handshake flags and client flags.
FLAG_FIXED_NEWSTYLE: Final[int] = 1 << 0
FLAG_NO_ZEROES: Final[int] = 1 << 1
FLAG_C_FIXED_NEWSTYLE: Final[int] = 1 << 0
FLAG_C_NO_ZEROES: Final[int] = 1 << 1

# Transmission flags.
FLAG_HAS_FLAGS: Final[int] = 1 << 0
FLAG_READ_ONLY: Final[int] = 1 << 1
FLAG_SEND_FLUSH: Final[int] = 1 << 2
FLAG_SEND_FUA: Final[int] = 1 << 3
FLAG_ROTATIONAL: Final[int] = 1 << 4
FLAG_SEND_TRIM: Final[int] = 1 << 5
FLAG_SEND_WRITE_ZEROES: Final[int] = 1 << 6
FLAG_SEND_DF: Final[int] = 1 << 7
FLAG_CAN_MULTI_CONN: Final[int] = 1 << 8
FLAG_SEND_RESIZE: Final[int] = 1 << 9
FLAG_SEND_CACHE: Final[int] = 1 << 10
FLAG_SEND_FAST_ZERO: Final[int] = 1 << 11
FLAG_BLOCK_STATUS_PAYLOAD: Final[int] = 1 << 12

# Options.
OPT_EXPORT_NAME: Final[int] = 1
OPT_ABORT: Final[int] = 2
OPT_LIST: Final[int] = 3
OPT_PEEK_EXPORT: Final[int] = 4
OPT_STARTTLS: Final[int] = 5
OPT_INFO: Final[int] = 6
OPT_GO: Final[int] = 7
OPT_STRUCTURED_REPLY: Final[int] = 8
OPT_LIST_META_CONTEXT: Final[int] = 9
OPT_SET_META_CONTEXT: Final[int] = 10
OPT_EXTENDED_HEADERS: Final[int] = 11

# Option replies. Every error has bit 31.
REP_ACK: Final[int] = 1
REP_SERVER: Final[int] = 2
REP_INFO: Final[int] = 3
REP_META_CONTEXT: Final[int] = 4
REP_FLAG_ERROR: Final[int] = 1 << 31
REP_ERR_UNSUP: Final[int] = REP_FLAG_ERROR + 1
REP_ERR_POLICY: Final[int] = REP_FLAG_ERROR + 2
REP_ERR_INVALID: Final[int] = REP_FLAG_ERROR + 3
REP_ERR_PLATFORM: Final[int] = REP_FLAG_ERROR + 4
REP_ERR_TLS_REQD: Final[int] = REP_FLAG_ERROR + 5
REP_ERR_UNKNOWN: Final[int] = REP_FLAG_ERROR + 6
REP_ERR_SHUTDOWN: Final[int] = REP_FLAG_ERROR + 7
REP_ERR_BLOCK_SIZE_REQD: Final[int] = REP_FLAG_ERROR + 8
REP_ERR_TOO_BIG: Final[int] = REP_FLAG_ERROR + 9
REP_ERR_EXT_HEADER_REQD: Final[int] = REP_FLAG_ERROR + 10

# Information types of INFO and GO.
INFO_EXPORT: Final[int] = 0
INFO_NAME: Final[int] = 1
INFO_DESCRIPTION: Final[int] = 2
INFO_BLOCK_SIZE: Final[int] = 3

# Commands.
CMD_READ: Final[int] = 0
CMD_WRITE: Final[int] = 1
CMD_DISC: Final[int] = 2
CMD_FLUSH: Final[int] = 3
CMD_TRIM: Final[int] = 4
CMD_CACHE: Final[int] = 5
CMD_WRITE_ZEROES: Final[int] = 6
CMD_BLOCK_STATUS: Final[int] = 7
CMD_RESIZE: Final[int] = 8

# Command flags.
CMD_FLAG_FUA: Final[int] = 1 << 0
CMD_FLAG_NO_HOLE: Final[int] = 1 << 1
CMD_FLAG_DF: Final[int] = 1 << 2
CMD_FLAG_REQ_ONE: Final[int] = 1 << 3
CMD_FLAG_FAST_ZERO: Final[int] = 1 << 4
CMD_FLAG_PAYLOAD_LEN: Final[int] = 1 << 5

# Structured replies. Every error chunk type has bit 15.
REPLY_FLAG_DONE: Final[int] = 1 << 0
REPLY_TYPE_NONE: Final[int] = 0
REPLY_TYPE_OFFSET_DATA: Final[int] = 1
REPLY_TYPE_OFFSET_HOLE: Final[int] = 2
REPLY_TYPE_BLOCK_STATUS: Final[int] = 5
REPLY_TYPE_BLOCK_STATUS_EXT: Final[int] = 6
REPLY_TYPE_FLAG_ERROR: Final[int] = 1 << 15
REPLY_TYPE_ERROR: Final[int] = REPLY_TYPE_FLAG_ERROR + 1
REPLY_TYPE_ERROR_OFFSET: Final[int] = REPLY_TYPE_FLAG_ERROR + 2

# Metadata contexts.
BASE_ALLOCATION: Final = "base:allocation"
STATE_HOLE: Final[int] = 1 << 0
STATE_ZERO: Final[int] = 1 << 1

# The eight errors. They equal Linux's errnos, but the wire's numbers are fixed by proto.md.
EPERM: Final[int] = 1
EIO: Final[int] = 5
ENOMEM: Final[int] = 12
EINVAL: Final[int] = 22
ENOSPC: Final[int] = 28
EOVERFLOW: Final[int] = 75
ENOTSUP: Final[int] = 95
ESHUTDOWN: Final[int] = 108


def _names(prefix: str) -> dict[int, str]:
    return {
        value: name.removeprefix("CMD_")
        for name, value in globals().items()
        if name.startswith(prefix) and isinstance(value, int)
    }


OPT_NAMES: Final = {k: v.removeprefix("OPT_") for k, v in _names("OPT_").items()}
REP_NAMES: Final = {
    k: v.removeprefix("REP_")
    for k, v in _names("REP_").items()
    if v != "REP_FLAG_ERROR"
}
INFO_NAMES: Final = {k: v.removeprefix("INFO_") for k, v in _names("INFO_").items()}
CMD_FLAG_NAMES: Final = {
    k: v.removeprefix("FLAG_") for k, v in _names("CMD_FLAG_").items()
}
REPLY_TYPE_NAMES: Final = {
    k: v.removeprefix("REPLY_TYPE_")
    for k, v in _names("REPLY_TYPE_").items()
    if v != "REPLY_TYPE_FLAG_ERROR"
}
CMD_NAMES: Final = {
    CMD_READ: "READ",
    CMD_WRITE: "WRITE",
    CMD_DISC: "DISC",
    CMD_FLUSH: "FLUSH",
    CMD_TRIM: "TRIM",
    CMD_CACHE: "CACHE",
    CMD_WRITE_ZEROES: "WRITE_ZEROES",
    CMD_BLOCK_STATUS: "BLOCK_STATUS",
    CMD_RESIZE: "RESIZE",
}
ERROR_NAMES: Final = {
    EPERM: "EPERM",
    EIO: "EIO",
    ENOMEM: "ENOMEM",
    EINVAL: "EINVAL",
    ENOSPC: "ENOSPC",
    EOVERFLOW: "EOVERFLOW",
    ENOTSUP: "ENOTSUP",
    ESHUTDOWN: "ESHUTDOWN",
}
