# SPDX-License-Identifier: Apache-2.0
"""Numbers and constants of the NBD protocol: lengths of headers, commands, flags, and the first bytes of messages.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.
"""

cdef enum:
    REQUEST_BYTES = 28  # a request without its payload
    DATA_BYTES = 28  # the header of an OFFSET_DATA chunk, with its offset
    SIMPLE_BYTES = 16  # a simple reply without its data
    HOLE_BYTES = 32  # an OFFSET_HOLE chunk
    # The same with extended headers. A WRITE is answered with a NONE chunk.
    EXTENDED_REQUEST_BYTES = 32
    EXTENDED_DATA_BYTES = 40
    EXTENDED_DONE_BYTES = 32
    EXTENDED_HOLE_BYTES = 44
    COMMAND_READ = 0
    COMMAND_WRITE = 1
    COMMAND_FLUSH = 3
    FLAG_FUA = 1
    FLAG_PAYLOAD_LEN = 32  # of a WRITE with extended headers: says only that it has a payload

# The first four bytes of a request, or the first eight of a reply, as they go over the wire. In a reply the cookie follows.
cdef const char *REQUEST_HEAD = b"\x25\x60\x95\x13"
cdef const char *DATA_HEAD = b"\x66\x8e\x33\xef\x00\x01\x00\x01"  # structured, DONE, OFFSET_DATA
cdef const char *HOLE_HEAD = b"\x66\x8e\x33\xef\x00\x01\x00\x02"  # structured, DONE, OFFSET_HOLE
cdef const char *SIMPLE_HEAD = b"\x67\x44\x66\x98\x00\x00\x00\x00"  # no error
cdef const char *EXTENDED_REQUEST_HEAD = b"\x21\xe4\x1c\x71"
cdef const char *EXTENDED_DATA_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x01"  # DONE, OFFSET_DATA
cdef const char *EXTENDED_HOLE_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x02"  # DONE, OFFSET_HOLE
cdef const char *EXTENDED_DONE_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x00"  # DONE, NONE
