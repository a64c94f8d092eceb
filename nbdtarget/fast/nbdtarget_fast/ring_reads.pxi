# SPDX-License-Identifier: Apache-2.0
"""READs that the page cache cannot answer: io_uring carries them out.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. Such a READ goes to the ring of its file (`nbdtarget_ring`): one entry for each READ, and one system call for all of a
batch. Each has a buffer of its own, from which its reply is sent when it has ended (`Plane.reads_ended`). It is under way while other code
runs. So before any Python code runs, all who must wait for it have been told of it (`note_begun`):

    the mapped devices on its way   `Route.in_flight`: a suspend, a swap and a removal wait
    its block of a cache            `Route.hold`: the cache block is not used for another one meanwhile
    its file                        `FastFile.note_reads`: the descriptor stays open
    its connection                  `Plane.ring_reads`: it counts against all bounds, and the connection is not released

So nothing goes wrong if the route is closed meanwhile. A READ that fails or comes short is read again by Python, which finds out why.

*A READ that is alone.* A client that sends one READ at a time would wait for two wake-ups: when the disk has answered, and when its next
request has come. Both cost more than the READ of a fast disk. So while a connection is the only one that has something to do, and
sends one request at a time, its READ is waited for within the turn, up to WAIT_NS (`wait_for_read`). That holds up the loop as polling does,
and no longer than a turn lasts (`turn_ns`), but the processor is free meanwhile. Where the disk is slow, this soon stops: each wait that
is in vain doubles the number of READs that are not waited for.
"""

cdef enum:
    WAIT_NS = 250000  # so long a READ that is alone is waited for
    WAIT_SKIP_MAX = 64  # each time that this was in vain, it is left out for twice as many of the next READs, up to so many
    GATHER_PIECES = 128  # parts of one message: two for each reply


cdef bint begin_ring_read(
    Plane plane, Way *way, File *file, const uint8_t *request, uint64_t offset, uint64_t file_at, uint32_t length
) noexcept nogil:
    """Put a READ into the ring; `submit` must follow. False: it is for Python."""
    cdef Read *read
    if not ring_takes(file, file_at, length):
        return False
    if plane.nr_left < 0:
        with gil:
            ask_whether_alone(plane, length)
            if not plane.is_alone:
                ask_for_room(plane)
    if not plane.nr_left or plane.bytes_left < length:
        return False
    if plane.uring != file.uring:
        if plane.nr_in_ring or plane.nr_begun:
            return False
        plane.uring = file.uring
    read = begin_read(file.uring, &plane.reader, file.fd, file_at, length)
    if read == NULL:
        return False
    plane.nr_left -= 1
    plane.bytes_left -= length
    read.head_length = pack_head(plane, read.head, request, length)
    read.is_hole = False
    read.sent = 0
    read.offset = offset
    time_anyway(&plane.counter, 0)
    read.begun_ns = plane.counter.received_ns
    read.block = (offset - way.begin) // way.block_size if way.kind == KIND_TABLE else 0
    read.file = file
    read.after = plane.begun
    plane.begun = read
    plane.nr_begun += 1
    file.nr_reads += 1
    return True


cdef bint should_wait(Plane plane) noexcept nogil:
    """Whether to wait for the one READ that was received: going back to the loop takes longer than a fast disk."""
    cdef File *file = <File *>plane.begun.file
    if (
        not plane.may_wait or not plane.is_alone or plane.nr_begun != 1 or plane.uring.nr_reads != 1 or plane.uring.nr_new != 1 or not plane.uring.can_wait
        or plane.end > plane.begin or plane.out > plane.base
    ):
        return False
    if file.wait_skip:
        file.wait_skip -= 1
        return False
    return True


cdef void wait_for_read(Plane plane) noexcept nogil:
    """Submit the READ, and wait for it; if it ends in time, it is answered like one from the page cache."""
    cdef Read *read = plane.begun
    cdef File *file = <File *>read.file
    cdef uint8_t *reply = <uint8_t *>plane.arena.buf + plane.out
    if not submit_and_wait(plane.uring, WAIT_NS):
        file.wait_penalty = min(2 * file.wait_penalty + 1, WAIT_SKIP_MAX)
        file.wait_skip = file.wait_penalty
        return
    file.wait_penalty = 0
    if read.result != <int>read.length:
        return  # it has failed, and `take_turn` sees to that
    take_ended(plane.uring, &plane.reader)
    plane.begun = NULL
    plane.nr_begun = 0
    file.nr_reads = 0
    pack_waited(reply, read, plane.zero_min, &plane.out)
    plane.counter.nr[COMMAND_READ] += 1
    plane.counter.nr_bytes[COMMAND_READ] += read.length
    plane.nr_left = -1  # nothing is in flight any more
    if plane.poison:
        memset(read.data, 0xdb, read.room)
    give_back(read)


cdef void ask_whether_alone(Plane plane, uint32_t length) noexcept:
    """Find out whether the READ at `begin` is alone. Then it may begin: a connection that has nothing in flight may always
    begin a short request."""
    plane.is_alone = False
    if (
        plane.may_wait and not plane.nr_begun and plane.end - plane.begin == plane.request_bytes
        and plane.out == plane.base and length <= plane.alone_max
    ):
        plane.is_alone = plane.ring_reads.is_alone()
    if plane.is_alone:
        plane.nr_left = 1
        plane.bytes_left = length


cdef void ask_for_room(Plane plane) noexcept:
    """Find out how many requests may be in flight after this turn."""
    plane.nr_left = 0
    plane.nr_left, plane.bytes_left = plane.ring_reads.room()
    plane.nr_left -= plane.nr_syncs
    if plane.nr_left < 0:
        plane.nr_left = 0


cdef note_begun(Plane plane, Route route):
    """What has begun in this turn is under way while Python code runs: tell all that have to wait for its end."""
    cdef Read *read = plane.begun
    cdef int64_t nr = plane.nr_begun
    cdef int64_t nr_bytes = 0
    plane.begun = NULL
    plane.nr_begun = 0
    # The plane and the route must still be there when the reads end.
    if not plane.nr_in_ring:
        Py_INCREF(plane)
    plane.nr_in_ring += nr
    while read != NULL:
        Py_INCREF(route)
        read.route = <void *>route
        nr_bytes += read.length
        if route.hold is not None:
            route.hold(read.block)
        read = read.after
    for each in route.in_flight:
        each.begin_reads(nr)
    for file in (route.file, route.other):
        if file is not None and (<FastFile>file).file.nr_reads:
            (<FastFile>file).note_reads((<FastFile>file).file.nr_reads)
            (<FastFile>file).file.nr_reads = 0
    plane.ring_reads.begun(nr, nr_bytes)
    if plane.uring.nr_new:
        # The kernel did not take them all.
        route.file._ring.left_over()


cdef BaseException note_ended(Plane plane, Read *read):
    """Tell all that wait for the end of these reads, and give their memory back. Returns what one of them raised."""
    cdef Read *following
    cdef File *file
    cdef Route route
    cdef int64_t nr
    cdef BaseException error = None
    while read != NULL:
        # Reads that follow each other have mostly gone the same way: tell of such a row at once.
        route = <Route>read.route
        file = <File *>read.file
        nr = 0
        while read != NULL and read.route == <void *>route and read.file == file:
            following = read.next
            nr += 1
            if route.let_go is not None:
                try:
                    route.let_go(read.block)
                except BaseException as raised:
                    error = raised
            if plane.poison:
                memset(read.data, 0xdb, read.room)
            Py_DECREF(route)
            give_back(read)
            read = following
        for each in route.in_flight:
            try:
                each.end_reads(nr)
            except BaseException as raised:
                error = raised
        try:
            route.file_of(file).note_reads(-nr)
        except BaseException as raised:
            error = raised
    return error


cdef void send_reads(Plane plane, Read *read) noexcept nogil:
    """Send the replies to the reads of this list, up to the first that the socket does not take whole."""
    cdef iovec pieces[GATHER_PIECES]
    cdef size_t nr_pieces
    cdef Read *first
    cdef Py_ssize_t sent
    cdef size_t left
    while read != NULL:
        first = read
        nr_pieces = 0
        while read != NULL and nr_pieces + 2 <= GATHER_PIECES:
            if read.result == <int>read.length:
                if not read.is_hole and read.length >= plane.zero_min and is_zero(read.data, read.length):
                    read.head_length = turn_into_hole(read.head, read.length)
                    read.is_hole = True
                pieces[nr_pieces].iov_base = read.head
                pieces[nr_pieces].iov_len = read.head_length
                nr_pieces += 1
                if not read.is_hole:
                    pieces[nr_pieces].iov_base = read.data
                    pieces[nr_pieces].iov_len = read.length
                    nr_pieces += 1
            read = read.next
        if not nr_pieces:
            return  # all of them have failed
        sent = send_iovec(plane, pieces, nr_pieces)
        while sent < 0 and errno == EINTR:
            sent = send_iovec(plane, pieces, nr_pieces)
        # After an error, too, the replies go into Python's queue: when they are sent from there, the same error comes up.
        while first != read:
            if first.result == <int>first.length:
                left = reply_length(first)
                if sent < <Py_ssize_t>left:
                    first.sent = sent if sent > 0 else 0
                    return
                first.sent = left
                sent -= left
            first = first.next


cdef void pack_waited(uint8_t *reply, Read *read, uint64_t zero_min, Py_ssize_t *out) noexcept nogil:
    """Pack the reply to a READ that was waited for and has ended."""
    if read.length >= zero_min and is_zero(read.data, read.length):
        read.head_length = turn_into_hole(read.head, read.length)
        read.is_hole = True
    memcpy(reply, read.head, read.head_length)
    if not read.is_hole:
        memcpy(reply + read.head_length, read.data, read.length)
    out[0] += reply_length(read)


cdef inline size_t reply_length(const Read *read) noexcept nogil:
    """How long the whole reply to a READ is."""
    return read.head_length if read.is_hole else read.head_length + read.length


cdef bytes unsent_part(const Read *read):
    """Return what the socket has not taken of the reply to a READ."""
    cdef bytes head = read.head[:read.head_length]
    if read.is_hole:
        return head[read.sent:]
    return (head + read.data[:read.length])[read.sent:]
