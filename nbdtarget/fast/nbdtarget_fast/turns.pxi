# SPDX-License-Identifier: Apache-2.0
"""A turn: receive a batch of requests, serve it and send the replies, again and again, until there is a reason to stop.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. A turn works with the two buffers of its connection and four places in them:

    receive buffer   [begin, end): received and not yet served
    arena            [base, out): replies that are packed and not yet sent

Python code works with the same buffers, and has the four numbers too: a turn is told them, and leaves them in the fields of the plane.
While a turn runs, no Python code touches the buffers, and the other way round.

    take_turn   has the interpreter's lock: prepares a turn, and afterwards tells the device and its files what happened
    run_turn    does not have it: receives, serves and sends

After an answer, a turn may look at the socket again and again for a moment (`poll_ns`): a client that waits for each answer sends its next
request soon, and to sleep until then costs more. No turn lasts much longer than `turn_ns`, so that other connections are served, too.

With TLS, `nbdtarget_tls` stands between the socket and the two buffers. It may have received more than the receive buffer takes, which the
event loop cannot know. So a turn does not end with DONE before all of it is served.
"""

cdef enum:
    POLL_GAP_NS = 20000  # more time between two looks at the socket: something else wants the processor, and polling ends
    # If more bytes than LARGE of a WRITE are still to come, only BEHIND_LARGE bytes are received behind them; see `room_to_receive`.
    LARGE = 32768
    BEHIND_LARGE = 4096


cdef int take_turn(Plane plane, Route route, int64_t poll_ns, bint goes_on, int lone) except -1:
    """As `Plane.turn`. The four places are already in the fields of the plane."""
    cdef Stop stop
    cdef FastFile cut
    cdef uint64_t nr_reads, nr_writes
    plane.lone_sync = LONE_NOTHING
    if lone and route.file._syncer is not None and route.may_sync is not None and route.may_sync():
        plane.lone_sync = lone
    if not plane.has_buffers or not route.note_locked():
        plane.was_batch = False
        plane.nr_hits = plane.nr_sync_hits = 0
        return STOP_SLOW
    if not (0 <= plane.begin <= plane.end <= plane.received.len and 0 <= plane.base <= plane.out <= plane.arena.len):
        raise ValueError("these places lie outside of the buffers")
    if not goes_on:
        plane.turn_end = 0
    plane.nr_left = -1 if plane.ring_reads is not None else 0
    with nogil:
        stop = run_turn(plane, &route.way, poll_ns)
    if stop == STOP_DONE and has_pending(plane):
        stop = STOP_TURN_OVER  # requests wait for a FLUSH; the loop does not know that there are more, and would not call again
    if route.way.nr_noted:
        route.tell_hits()
    if plane.nr_begun:
        note_begun(plane, route)
        if plane.reader.first != NULL:
            plane.reads_ended(0)  # it was waited for, and has failed
    if route.file.file.kick_error:
        route.file.kick_failed(route.file.file.kick_error)
        route.file.file.kick_error = 0
    if route.file.file.is_left:
        route.file.file.is_left = False
        route.file.sync_left()
    if route.file.file.was_slow:
        route.file.file.was_slow = False
        route.file.was_slow()
    if plane.has_mapped:
        plane.has_mapped = False
        route.tell_windows()
    if plane.is_cut and plane.cut_file != NULL:
        cut, plane.cut_file = route.file_of(plane.cut_file), NULL
        if cut.read_failed is not None:
            cut.read_failed(plane.error)
    nr_reads, nr_writes = route.way.nr_reads, route.way.nr_writes
    route.way.nr_reads = route.way.nr_writes = 0
    if route.was_served is not None and (nr_reads or nr_writes):
        route.was_served(nr_reads, nr_writes)
    if stop == STOP_UNFINISHED:
        route.file.was_unfinished(plane.put_at, plane.put_length, plane.put, plane.error, plane.nr_put_before)
    return stop


cdef Stop run_turn(Plane plane, Way *way, int64_t poll_ns) noexcept nogil:
    """Receive, serve and send, until there is a reason to stop, which is returned."""
    global nr_batches
    cdef Stop stop
    cdef ssize_t got
    cdef uint8_t *into = <uint8_t *>plane.received.buf
    cdef int64_t began = 0, looked = 0, ended = 0, now
    cdef bint has_replies, is_lone
    cdef bint is_received = plane.end > plane.begin  # what is in the buffer already is served first
    plane.was_batch = False
    plane.was_late = False
    plane.is_stuck = plane.is_cut = False
    plane.nr_hits = plane.nr_sync_hits = 0
    plane.may_wait = poll_ns > 0 or plane.waits
    while True:
        if is_received:
            is_received = False
            begin_batch(&plane.counter, &sampling, 0)
        else:
            if plane.end == plane.received.len:
                if not plane.begin:
                    return STOP_SLOW  # one request that does not fit: Python receives it into memory of its own
                compact(plane)
            got = receive(plane, into + plane.end, room_to_receive(plane))
            if got < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    plane.error = errno
                    return STOP_FAILED
                if not poll_ns:
                    return STOP_DONE
                # Right after an answer the time is known, which saves a look at the clock.
                now, ended = ended or now_ns(), 0
                if not began:
                    began = now
                elif now - began > poll_ns or now - looked > POLL_GAP_NS:
                    return STOP_POLLED
                sched_yield()
                looked = now_ns()
                if looked - now > plane.late_ns:
                    plane.was_late = True
                    poll_ns = 0
                continue
            if not got:
                return STOP_CLOSED
            # If the socket was polled, the time of the last look is that of the request. If a durable request is expected, the batch will be timed in
            # any case, so look at the clock now.
            begin_batch(&plane.counter, &sampling, looked if began else now_ns() if plane.sync_credit else 0)
            if began:
                began = 0
                if plane.sync_credit:
                    plane.nr_sync_hits += 1
                else:
                    plane.nr_hits += 1
            plane.end += got
            nr_batches += 1
            if got > plane.request_bytes and is_batch(plane):
                plane.was_batch = True
                plane.may_wait = False
                poll_ns = 0
        stop = serve(plane, way)
        if plane.nr_begun and plane.uring.nr_new:
            if stop == STOP_DONE and should_wait(plane):
                wait_for_read(plane)
            else:
                submit(plane.uring)
        has_replies = plane.out > plane.base
        is_lone = plane.nr_syncs == 1 and stop == STOP_DONE and plane.lone_sync and not has_replies
        plane.stay_polls = poll_ns > 0
        if is_lone and sync_alone(plane, way):
            has_replies = True  # perhaps the thread has sent it already
            if plane.stay_way != NULL:
                poll_ns = 0  # the thread has waited for longer than that
                stop = plane.stay_stop
                if stop == STOP_RECEIVED:
                    is_received = True
                    continue
                if stop == STOP_CLOSED:
                    return stop
        if plane.is_kick_due:
            kick_ahead(plane, way.file)  # it was not alone after all
        if stop == STOP_SLOW or stop == STOP_UNFINISHED or stop == STOP_FAILED or stop == STOP_BLOCKED:
            end_batch(&plane.counter, &sampling)
            return stop
        if has_replies and not send_replies(plane):
            end_batch(&plane.counter, &sampling)
            return STOP_FAILED if plane.error else STOP_BLOCKED
        if plane.nr_unsynced == 1 and plane.nr_pairs == SYNC_PAIRS:
            kick_ahead(plane, way.file)
        now = end_batch(&plane.counter, &sampling)
        # All is answered. The turn goes on only to poll the socket, or to receive the rest of a request that is on its way.
        if stop != STOP_DONE or plane.nr_syncs or has_replies and not poll_ns and plane.begin == plane.end and not has_pending(plane):
            return stop
        now = ended = now or now_ns()
        # A client that sends one request after the other must not keep the loop for ever.
        if is_turn_over(plane, now):
            return STOP_TURN_OVER


cdef inline bint is_turn_over(Plane plane, int64_t now) noexcept nogil:
    """Whether this turn has lasted long enough. Its time begins with the first call."""
    if not plane.turn_end:
        plane.turn_end = now + plane.turn_ns
    return now > plane.turn_end


cdef inline ssize_t receive(Plane plane, uint8_t *into, size_t room) noexcept nogil:
    """As recv; with TLS, what is received is decrypted."""
    if plane.records != NULL:
        return tls_receive(plane.records, into, room)
    return socket_recv(plane.sock, into, room, MSG_DONTWAIT)


cdef Py_ssize_t room_to_receive(Plane plane) noexcept nogil:
    """Return how many bytes to receive now.

    While a large WRITE comes in, these are the rest of it and only a few more. So the next WRITE can begin at the same place of the buffer as this one:
    that memory stays in the processor's cache, and nothing large is ever moved.
    """
    cdef Py_ssize_t room = plane.received.len - plane.end
    cdef Py_ssize_t left
    cdef const uint8_t *at = <const uint8_t *>plane.received.buf + plane.begin
    cdef uint16_t command
    if plane.end - plane.begin < plane.request_bytes:
        return room
    memcpy(&command, at + 6, 2)
    left = plane.request_bytes + <Py_ssize_t>length_of(plane, at) - (plane.end - plane.begin)
    if be16toh(command) == COMMAND_WRITE and LARGE < left and left + BEHIND_LARGE < room:
        return left + BEHIND_LARGE
    return room


cdef inline bint is_batch(Plane plane) noexcept nogil:
    """Whether more than one request lies in the receive buffer."""
    cdef const uint8_t *at = <const uint8_t *>plane.received.buf + plane.begin
    cdef Py_ssize_t left = plane.end - plane.begin - plane.request_bytes
    cdef uint16_t command
    if left <= 0:
        return False
    memcpy(&command, at + 6, 2)
    return be16toh(command) != COMMAND_WRITE or left > <Py_ssize_t>length_of(plane, at)


cdef inline bint has_pending(Plane plane) noexcept nogil:
    """Whether TLS has bytes that the loop does not know of."""
    return plane.records != NULL and tls_has_pending(plane.records)


cdef bint send_replies(Plane plane) noexcept nogil:
    """Send the replies. Returns whether all have left. If not, the socket takes no more for now (`error` is 0), or it has failed."""
    cdef uint8_t *arena = <uint8_t *>plane.arena.buf
    cdef iovec place
    cdef ssize_t sent
    plane.error = 0
    while plane.base < plane.out:
        place.iov_base = arena + plane.base
        place.iov_len = plane.out - plane.base
        sent = send_iovec(plane, &place, 1)
        if sent < 0:
            if errno == EINTR:
                continue
            if errno != EAGAIN:
                plane.error = errno
            plane.is_stuck = True
            return False
        plane.base += sent
    all_sent(plane, plane.out)
    return True


cdef inline ssize_t send_iovec(Plane plane, const iovec *pieces, size_t nr_pieces) noexcept nogil:
    """As sendmsg; with TLS, what is sent is encrypted.

    TLS demands that after EAGAIN, or when only a part was sent, the next call begins with the same bytes. It does, also if Python makes that call, for
    what it has in the queue of `Output`.
    """
    cdef msghdr message
    if plane.records != NULL:
        return tls_send(plane.records, pieces, nr_pieces)
    if nr_pieces == 1:
        return socket_send(plane.sock, pieces.iov_base, pieces.iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
    memset(&message, 0, sizeof(message))
    message.msg_iov = <iovec *>pieces
    message.msg_iovlen = nr_pieces
    return sendmsg(plane.sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL)


cdef inline void all_sent(Plane plane, Py_ssize_t used) noexcept nogil:
    """All replies have left; so many bytes of the arena were used for them."""
    if plane.poison:
        memset(plane.arena.buf, 0xdb, used)
    plane.base = plane.out = 0
    plane.is_stuck = False


cdef Stop make_room(Plane plane) noexcept nogil:
    """Send the replies, because the arena has no room for one more. Returns STOP_DONE if there is room now, otherwise the reason why not."""
    if send_replies(plane):
        return STOP_DONE
    return STOP_FAILED if plane.error else STOP_BLOCKED


cdef void make_room_for(Plane plane, Py_ssize_t size) noexcept nogil:
    """Make room for the request at `begin`, which has so many bytes, and part of which is still to come.

    It is moved only if it would not fit where it lies: moving costs as much as receiving.
    """
    if plane.begin + size > plane.received.len:
        compact(plane)


cdef void compact(Plane plane) noexcept nogil:
    """Move what is not served yet to the beginning of the receive buffer."""
    cdef uint8_t *received = <uint8_t *>plane.received.buf
    cdef Py_ssize_t left = plane.end - plane.begin
    if not plane.begin:
        return
    if left:
        memmove(received, received + plane.begin, left)
    if plane.poison:
        memset(received + left, 0xdb, plane.end - left)
    plane.begin = 0
    plane.end = left
