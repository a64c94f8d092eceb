# SPDX-License-Identifier: Apache-2.0
"""Replies. It is a part of `nbdtarget_fast`."""


cdef inline bint is_zero(const uint8_t *data, size_t length) noexcept nogil:
    return not data[0] and not memcmp(data, data + 1, length - 1)


cdef Py_ssize_t turn_into_hole(uint8_t *reply, uint32_t length) noexcept nogil:
    """Make the header of an OFFSET_HOLE chunk of the one of an OFFSET_DATA chunk. Returns how long it is."""
    cdef uint32_t number = htobe32(length)
    cdef uint32_t payload = htobe32(12)
    if memcmp(reply, EXTENDED_DATA_HEAD, 8) == 0:
        memcpy(reply, EXTENDED_HOLE_HEAD, 8)
        memset(reply + 24, 0, 4)
        memcpy(reply + 28, &payload, 4)
        memcpy(reply + 40, &number, 4)
        return EXTENDED_HOLE_BYTES
    memcpy(reply, HOLE_HEAD, 8)
    memcpy(reply + 16, &payload, 4)
    memcpy(reply + 28, &number, 4)
    return HOLE_BYTES


cdef void pack_waited(uint8_t *reply, Read *read, uint64_t zero_min, Py_ssize_t *out) noexcept nogil:
    """Pack the reply to a READ that has ended."""
    if read.length >= zero_min and is_zero(read.data, read.length):
        read.head_length = turn_into_hole(read.head, read.length)
        read.is_hole = True
    memcpy(reply, read.head, read.head_length)
    if not read.is_hole:
        memcpy(reply + read.head_length, read.data, read.length)
    out[0] += reply_length(read)


cdef inline size_t reply_length(const Read *read) noexcept nogil:
    return read.head_length if read.is_hole else read.head_length + read.length


cdef bytes unsent_part(const Read *read):
    cdef bytes head = read.head[:read.head_length]
    if read.is_hole:
        return head[read.sent:]
    return (head + read.data[:read.length])[read.sent:]
