# SPDX-License-Identifier: Apache-2.0
"""Long READs, which the kernel sends from a mapping of the file: they are not copied into the arena.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. `nbdtarget_map` has the mappings, and its head says what they are for. `send_mapped` sends all replies that wait and
the one to the READ with a single system call. What the socket does not take is read into the arena before anything else happens
(`read_unsent`). So nothing that waits to be sent refers to a mapping, and for a suspend, a swap or a later WRITE it is as after any other READ.
A WRITE of another client at the same time may show in a part of the reply, as it may when a READ is copied.
"""

cdef enum:
    PLACES_MAX = 80  # parts of one message: the replies before it, and a part for each window that a piece of the READ lies in
    ZERO_LOOK = 4096  # so many bytes at the end of a READ are searched: in most cases they show that it is no hole

cdef enum Mapped:
    # What became of a READ that was to be sent from a mapping.
    MAPPED_NOT  # it takes the usual way
    MAPPED_SENT  # it has been sent, or the rest of it is in the arena
    MAPPED_SLOW  # it is for Python, and nothing of its reply has left
    MAPPED_FAILED  # the socket has failed, with `error`, or the rest of a reply is lost


cdef Mapped send_mapped(
    Plane plane, const Piece *pieces, int nr_pieces, uint8_t *reply, const uint8_t *request, uint32_t length
) noexcept nogil:
    """Send all replies, and behind them the one to this READ, whose data the kernel takes from mappings of the files.

    Args: reply: where the arena has room for its reply.
    """
    cdef iovec places[PLACES_MAX]
    cdef int nr, earlier, nr_places = 1
    cdef File *file = pieces[0].file
    cdef Py_ssize_t head = plane.data_bytes, before = plane.out - plane.base
    cdef Py_ssize_t sent
    cdef uint64_t look, done = 0
    cdef int64_t began, taken_ns
    if plane.is_stuck or plane.records != NULL or file.mapping.table == NULL:
        return MAPPED_NOT
    places[0].iov_base = reply - before
    places[0].iov_len = <size_t>(before + head)
    map_begin(file.mapping.table, length)
    plane.has_mapped = True  # also if a window is mapped, and nothing is sent from it
    for nr in range(nr_pieces):
        file = pieces[nr].file
        if (
            length > file.read_max or length < file.mapping.length_min or file.mapping.table != pieces[0].file.mapping.table
            or not lies_in(pieces[nr].at, pieces[nr].length, file.size) or file.fake_misses and is_fake_miss(file)
            or map_skips(&file.mapping)
        ):
            return MAPPED_NOT
        done += pieces[nr].length
        # A file that has been truncated may show zeroes up to the end of its last page: only pread tells of that. The end of the whole READ is
        # looked at for zeroes, too. If it has none, the READ is no hole.
        look = ZERO_LOOK if nr == nr_pieces - 1 and length >= plane.zero_min else 1
        look = min(look, pieces[nr].length)
        if not read_end(file, reply + head + done - look, pieces[nr].at + pieces[nr].length - look, look):
            return MAPPED_NOT
        if look > 1 and is_zero(reply + head + done - look, look):
            return MAPPED_NOT
        nr_places = map_place(&file.mapping, file.fd, pieces[nr].at, pieces[nr].length, places, nr_places, PLACES_MAX)
        if nr_places < 0:
            return MAPPED_NOT
    time_anyway(&plane.counter, 0)  # a page that has left the page cache meanwhile is read from the disk while it is sent
    pack_head(plane, reply, request, length)
    began = now_ns()
    sent = send_iovec(plane, places, nr_places)
    while sent < 0 and errno == EINTR:
        sent = send_iovec(plane, places, nr_places)
    taken_ns = now_ns() - began
    for nr in range(nr_pieces):
        file = pieces[nr].file
        for earlier in range(nr):
            if pieces[earlier].file == file:
                break
        else:
            map_sent(&file.mapping, file.fake_send_ns or taken_ns)
    if sent == before + head + <Py_ssize_t>length:
        pieces[0].file.mapping.table.nr_sent += 1
        all_sent(plane, plane.out + head)
        return MAPPED_SENT
    if sent < 0:
        # EFAULT: a page has gone since it was looked at.
        if errno != EAGAIN and errno != EFAULT:
            plane.error = errno
            return MAPPED_FAILED
        sent = 0
    return read_unsent(plane, pieces, nr_pieces, reply, length, before, sent)


cdef Mapped read_unsent(
    Plane plane, const Piece *pieces, int nr_pieces, uint8_t *reply, uint32_t length, Py_ssize_t before, Py_ssize_t sent
) noexcept nogil:
    """Read into the arena what the socket has not taken of a READ: nothing may wait in a mapping.

    Args: before, sent: bytes in front of its reply, and bytes of all that were sent.
    """
    cdef Py_ssize_t head = plane.data_bytes
    cdef uint64_t skip = <uint64_t>max(sent - before - head, 0)
    cdef uint8_t *into = reply + head
    cdef int nr
    for nr in range(nr_pieces):
        if skip >= pieces[nr].length:
            skip -= pieces[nr].length
        else:
            plane.error = read_whole(pieces[nr].file, into + skip, pieces[nr].at + skip, pieces[nr].length - skip)
            skip = 0
            if plane.error and sent <= before:
                # Nothing of this reply has left: Python reads it again, and finds out why it failed.
                plane.base += sent
                if plane.base == plane.out:
                    all_sent(plane, plane.out)
                return MAPPED_SLOW
            if plane.error:
                plane.is_cut = True
                plane.cut_file = pieces[nr].file
                return MAPPED_FAILED
        into += pieces[nr].length
    plane.base += sent
    plane.out += head + <Py_ssize_t>length
    return MAPPED_SENT
