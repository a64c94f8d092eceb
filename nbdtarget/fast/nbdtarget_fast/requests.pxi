# SPDX-License-Identifier: Apache-2.0
"""Parse requests, and carry them out.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

`serve` stops in front of the first request that is not plain (STOP_SLOW). It verifies every field of a request before it uses it.
"""

cdef enum:
    LOOK_BYTES = 262144  # after so many bytes of requests `serve` looks at the clock
    REQUEST_WEIGHT = 4096  # each request counts as so many bytes more than it has


cdef Stop serve(Plane plane, Way *way) noexcept nogil:
    """Serve what is received. STOP_DONE: all of it, except the beginning of one more request."""
    cdef uint8_t *received = <uint8_t *>plane.received.buf
    cdef uint8_t *arena = <uint8_t *>plane.arena.buf
    cdef uint8_t *at
    cdef uint8_t *reply
    cdef uint16_t flags, command
    cdef uint32_t length
    cdef uint64_t offset, file_at = 0
    cdef uint64_t size = plane.size if plane.size < way.size else way.size
    cdef Py_ssize_t head = plane.data_bytes, request_bytes = plane.request_bytes
    cdef int64_t look_left = LOOK_BYTES
    cdef File *file
    cdef Piece pieces[MIXED_MAX]
    cdef int nr_hits, nr_pieces
    cdef Stop stop
    cdef Found found
    cdef Mapped mapped
    while plane.end - plane.begin >= request_bytes:
        at = received + plane.begin
        memcpy(&flags, at + 4, 2)
        memcpy(&command, at + 6, 2)
        memcpy(&offset, at + 16, 8)
        command = be16toh(command)
        offset = be64toh(offset)
        length = length_of(plane, at)
        if plane.extended and command == COMMAND_WRITE:
            flags &= be16toh(0xFFFF ^ FLAG_PAYLOAD_LEN)
        if command == COMMAND_FLUSH and plane.flush_for is not None and not flags and not offset and not length:
            # All FLUSHes of a batch share one FLUSH of the device, after all WRITEs of the batch.
            if memcmp(at, plane.request_head, 4) != 0 or not has_room_for_sync(plane):
                return STOP_SLOW
            note_sync(plane, at, True)
            plane.begin += request_bytes
            continue
        if (
            memcmp(at, plane.request_head, 4) != 0
            or flags and not is_durable_write(plane, way, flags, command)
            or command > COMMAND_WRITE
            or not length
            or length > plane.length_max
            or not lies_in(offset, length, size)
        ):
            return STOP_SLOW
        if command == COMMAND_WRITE:
            if not plane.can_write:
                return STOP_SLOW
            if plane.end - plane.begin - request_bytes < <int64_t>length:
                # The rest of its payload is on its way. What does not fit here is received by Python, into memory of its own.
                if request_bytes + <int64_t>length > plane.received.len:
                    return STOP_SLOW
                make_room_for(plane, request_bytes + <Py_ssize_t>length)
                return STOP_DONE
            if plane.out + plane.done_bytes > plane.arena.len:
                stop = make_room(plane)
                if stop != STOP_DONE:
                    return stop
            file = find(way, offset, length, True, &file_at)
            if file == NULL:
                stop = write_in_pieces(plane, way, at + request_bytes, offset, length)
                if stop != STOP_DONE:
                    return stop
            elif not file_takes(file, file_at, length):
                return STOP_SLOW
            elif not write_data(plane, file, at + request_bytes, file_at, length, 0):
                return STOP_UNFINISHED
            plane.counter.nr_bytes[COMMAND_WRITE] += length
            if flags:
                if file == NULL:
                    plane.unsynced_length = 0
                elif plane.lone_sync and plane.end - plane.begin == request_bytes + <Py_ssize_t>length:
                    # Perhaps a sync follows at once, and that begins to write it back.
                    plane.unsynced_at, plane.unsynced_length = file_at, length
                    plane.is_kick_due = True
                else:
                    kick_write(plane, file, file_at, length)
                note_sync(plane, at, False)
            else:
                plane.nr_unsynced += 1
                plane.unsynced_at, plane.unsynced_length = file_at, length if file != NULL else 0
                if plane.was_batch and plane.nr_pairs == SYNC_PAIRS:
                    kick_ahead(plane, way.file)
                plane.counter.nr[COMMAND_WRITE] += 1
                pack_done(plane, arena + plane.out, at)
                plane.out += plane.done_bytes
            plane.begin += request_bytes + length
            way.nr_writes += 1
        else:
            if head + <int64_t>length + HOLE_BYTES > plane.arena.len:
                return STOP_SLOW
            if plane.out + head + <int64_t>length + HOLE_BYTES > plane.arena.len:
                stop = make_room(plane)
                if stop != STOP_DONE:
                    return stop
            file = find(way, offset, length, False, &file_at)
            reply = arena + plane.out
            if file == NULL:
                nr_hits = find_pieces(way, offset, length, False, pieces)
                nr_pieces = join_pieces(pieces, nr_hits)
            else:
                pieces[0].file, pieces[0].at, pieces[0].length = file, file_at, length
                nr_hits = nr_pieces = 1
            mapped = MAPPED_NOT
            if nr_pieces and length >= pieces[0].file.mapping.length_min:
                mapped = send_mapped(plane, pieces, nr_pieces, reply, at, length)
                if mapped == MAPPED_FAILED:
                    return STOP_FAILED
                if mapped == MAPPED_SLOW:
                    return STOP_SLOW
            if mapped == MAPPED_SENT:
                found = FOUND
            elif file == NULL:
                found = read_pieces(pieces, nr_pieces, reply + head, length)
            else:
                found = file_read(file, reply + head, file_at, length)
            if found == FOUND:
                if mapped == MAPPED_NOT:
                    plane.out += pack_read(plane, reply, at, length)
                if way.kind == KIND_TABLE:
                    way.nr_reads += nr_hits - 1  # a hit for each block
                plane.counter.nr[COMMAND_READ] += 1
                plane.counter.nr_bytes[COMMAND_READ] += length
            elif found == REFUSED or not begin_ring_read(plane, way, file, at, offset, file_at, length):
                return STOP_SLOW
            plane.begin += request_bytes
            way.nr_reads += 1
            # Let the client begin to work on what is there.
            if plane.out - plane.base >= plane.flush_at and not send_replies(plane) and plane.error:
                return STOP_FAILED
        look_left -= length + REQUEST_WEIGHT
        if look_left < 0:
            look_left = LOOK_BYTES
            if is_turn_over(plane, now_ns()):
                return STOP_TURN_OVER
    compact(plane)
    return STOP_DONE


cdef inline uint32_t length_of(Plane plane, const uint8_t *request) noexcept nogil:
    """The length of a request; UINT32_MAX if it does not fit into 32 bits; no such request is plain."""
    cdef uint32_t length, high
    if plane.extended:
        memcpy(&high, request + 24, 4)
        if high:
            return UINT32_MAX
        memcpy(&length, request + 28, 4)
    else:
        memcpy(&length, request + 24, 4)
    return be32toh(length)


cdef inline bint is_durable_write(Plane plane, const Way *way, uint16_t flags, uint16_t command) noexcept nogil:
    """Whether it is a WRITE with FUA that may be carried out as a WRITE, and a FLUSH of the device.

    In a cache none is: it has several devices, and a FLUSH of it costs more than a WRITE with FUA.
    """
    return (
        command == COMMAND_WRITE and be16toh(flags) == FLAG_FUA and plane.flush_for is not None
        and way.kind != KIND_TABLE and has_room_for_sync(plane)
    )


cdef inline bint write_data(
    Plane plane, File *file, const uint8_t *data, uint64_t at, uint64_t length, int nr_before
) noexcept nogil:
    """Write this into the page cache. Returns whether it took all; if not, what it took is noted for UNFINISHED."""
    cdef int64_t slow_since = 0
    cdef uint64_t put = file_write(file, data, at, length, &plane.error, &slow_since)
    if slow_since:
        time_anyway(&plane.counter, slow_since)
    if put == length:
        return True
    plane.put, plane.put_at, plane.put_length, plane.nr_put_before = put, at, length, nr_before
    return False


cdef Stop write_in_pieces(Plane plane, Way *way, const uint8_t *data, uint64_t offset, uint64_t length) noexcept nogil:
    """Carry out a WRITE that goes to several places, if all of them are known. It may end in the midst of them, as UNFINISHED."""
    cdef Piece pieces[MIXED_MAX]
    cdef int nr_pieces = find_pieces(way, offset, length, True, pieces)
    cdef int nr
    if not nr_pieces:
        return STOP_SLOW
    for nr in range(nr_pieces):
        # A WRITE that ends in the midst of them is told to `was_unfinished` of this file, so all of them must be there.
        if pieces[nr].file != way.file or length > way.file.write_max:
            return STOP_SLOW
        if not file_takes(way.file, pieces[nr].at, pieces[nr].length):
            return STOP_SLOW
    for nr in range(nr_pieces):
        # Python cuts it in the same way, so the device gets these pieces again, one after the other.
        if not write_data(plane, way.file, data, pieces[nr].at, pieces[nr].length, nr):
            return STOP_UNFINISHED
        data += pieces[nr].length
    if way.kind == KIND_TABLE:
        way.nr_writes += nr_pieces - 1  # a hit for each block
    return STOP_DONE
