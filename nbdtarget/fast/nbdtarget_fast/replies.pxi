# SPDX-License-Identifier: Apache-2.0
"""Pack replies: simple ones, structured ones, and those with extended headers. A READ of zeroes is answered with a hole, where the client allows it.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.
"""


cdef Py_ssize_t pack_read(Plane plane, uint8_t *reply, const uint8_t *request, uint32_t length) noexcept nogil:
    """Write the header of a READ's reply, whose data is there. Returns how long the reply is."""
    cdef Py_ssize_t head = pack_head(plane, reply, request, length)
    if length >= plane.zero_min and is_zero(reply + head, length):
        return turn_into_hole(reply, length)
    return head + <Py_ssize_t>length


cdef Py_ssize_t pack_head(Plane plane, uint8_t *reply, const uint8_t *request, uint32_t length) noexcept nogil:
    """Write the header of a READ's reply. Returns how long the header is."""
    cdef uint32_t number
    cdef uint64_t long_number
    memcpy(reply + 8, request + 8, 8)
    if plane.extended:
        memcpy(reply, EXTENDED_DATA_HEAD, 8)
        memcpy(reply + 16, request + 16, 8)
        long_number = be64toh(<uint64_t>length + 8)
        memcpy(reply + 24, &long_number, 8)
        memcpy(reply + 32, request + 16, 8)
        return EXTENDED_DATA_BYTES
    if not plane.structured:
        memcpy(reply, SIMPLE_HEAD, 8)
        return SIMPLE_BYTES
    memcpy(reply, DATA_HEAD, 8)
    number = htobe32(length + 8)
    memcpy(reply + 16, &number, 4)
    memcpy(reply + 20, request + 16, 8)
    return DATA_BYTES


cdef inline void pack_done(Plane plane, uint8_t *reply, const uint8_t *request) noexcept nogil:
    """Write the reply to a WRITE, `done_bytes` long."""
    if plane.extended:
        memcpy(reply, EXTENDED_DONE_HEAD, 8)
        memcpy(reply + 8, request + 8, 16)  # the cookie and the offset
        memset(reply + 24, 0, 8)
    else:
        memcpy(reply, SIMPLE_HEAD, 8)
        memcpy(reply + 8, request + 8, 8)


cdef inline bint is_zero(const uint8_t *data, size_t length) noexcept nogil:
    """Whether all these bytes are zero; there is at least one."""
    return not data[0] and not memcmp(data, data + 1, length - 1)


cdef Py_ssize_t turn_into_hole(uint8_t *reply, uint32_t length) noexcept nogil:
    """Turn the header of an OFFSET_DATA chunk into a whole OFFSET_HOLE chunk. Returns how long that is."""
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
