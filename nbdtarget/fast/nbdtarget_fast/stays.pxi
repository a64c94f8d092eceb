# SPDX-License-Identifier: Apache-2.0
"""A client stays with the thread that syncs.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. A sync within the turn (`sync_alone`) takes two threads: the loop's and the Syncer's, and each hands over to the other
for every request. So after its answer the thread of the Syncer goes on in the place of the loop (`serve_on`), which still stands still. It waits for what the loop would
wait for: the next request of the client, and all other events (`loop_fd` is readable then). It serves this client alone, until something else happens,
or nothing for `stay_idle_ns`, or until `stay_ns` have passed.

The loop waits for each of these syncs as for the first one. If one takes too long, the loop goes on, and the thread touches nothing of the
connection any more.
"""

cdef enum:
    STAY_NS = 2000000  # a client may stay with the thread that syncs for so long: timers of the loop wait meanwhile
    # So long it waits there for the next request. What the loop was told to call soon waits meanwhile, too, and nothing tells the thread of that.
    STAY_IDLE_NS = 200000
    SPIN_NS = 20000  # so long the thread looks at the socket again and again, before it sleeps
    SPIN_SKIP_MAX = 512  # each time that it was in vain, twice as many requests are waited for asleep
    NOTHING_CAME = -2
    STAY_REST = 16  # so many syncs after it was ended by something else, it does not stay


cdef int64_t serve_on(Plane plane, ssize_t nr_sent, char *answer) noexcept nogil:
    """In the thread of the Syncer, which has answered: serve until a request needs a sync. Returns how many ns ago that was received, at least 1; 0: there is none.

    The loop stands still, and waits for the next sync, or the end.
    """
    cdef Way *way = plane.stay_way
    cdef File *file = way.file
    cdef uint64_t cookie
    cdef ssize_t got
    cdef int64_t now
    global nr_batches
    sync_answered(plane, file, max(nr_sent, 0))
    while True:
        plane.stay_stop = STOP_DONE
        if not send_replies(plane):
            plane.stay_stop = STOP_FAILED if plane.error else STOP_BLOCKED
            return 0
        if plane.nr_unsynced == 1 and plane.nr_pairs == SYNC_PAIRS:
            kick_ahead(plane, file)
        now = end_batch(&plane.counter, &sampling) or now_ns()
        plane.counter.received_ns = 0  # it has ended
        if file.kick_error or file.was_slow or now >= plane.stay_end:
            return 0  # for Python, or for timers
        got = receive_next(plane, now)
        if got == NOTHING_CAME:
            return 0
        if got <= 0:
            if not got:
                plane.stay_stop = STOP_CLOSED
            elif errno != EAGAIN and errno != EINTR:
                plane.error = errno
                plane.stay_stop = STOP_FAILED
            return 0
        now = now_ns()  # perhaps of another clock than the one of the Syncer
        plane.end += got
        nr_batches += 1
        if not is_one_to_store(plane):
            plane.was_batch = is_batch(plane)
            plane.stay_stop = STOP_RECEIVED
            return 0
        begin_batch(&plane.counter, &sampling, now)
        plane.stay_stop = serve(plane, way)
        if plane.stay_stop != STOP_DONE:
            return 0
        if plane.nr_syncs:
            plane.unsynced_length = 0
            memcpy(answer, SIMPLE_HEAD, 8)
            cookie = htobe64(plane.sync_cookies[0])
            memcpy(answer + 8, &cookie, 8)
            memcpy(<uint8_t *>plane.arena.buf + plane.out, answer, SIMPLE_BYTES)
            return max(now_ns() - now, 1)


cdef ssize_t receive_next(Plane plane, int64_t began) noexcept nogil:
    """As recv, after waiting for the client, since now. NOTHING_CAME: not for `stay_idle_ns`, or not before the stay has to end."""
    cdef uint8_t *into = <uint8_t *>plane.received.buf + plane.end
    cdef size_t room = plane.received.len - plane.end
    cdef int64_t now = began, looked
    cdef int64_t end = min(plane.stay_end, began + plane.stay_idle_ns)
    cdef ssize_t got
    cdef int ready
    if plane.spin_skip:
        plane.spin_skip -= 1
    elif plane.stay_polls:
        # To fall asleep and to be woken up takes longer than most clients need for their next request.
        while now - began < SPIN_NS:
            sched_yield()
            looked, now = now, now_ns()
            if now - looked > plane.late_ns:
                plane.was_late = True
                plane.stay_polls = False
            got = receive(plane, into, room)
            if got >= 0 or errno != EAGAIN:
                plane.spin_penalty = 0
                plane.nr_sync_hits += 1
                if wait_for_either(plane.loop_fd, -1, 0):
                    note_disturbance(plane)
                return got
            if plane.was_late:
                break
        plane.spin_penalty = min(2 * plane.spin_penalty + 1, SPIN_SKIP_MAX)
        plane.spin_skip = plane.spin_penalty
    ready = wait_for_either(plane.sock, plane.loop_fd, end - now) if now < end else 0
    if ready & OTHER_READY:
        note_disturbance(plane)
    return receive(plane, into, room) if ready & FIRST_READY else NOTHING_CAME


cdef inline void note_disturbance(Plane plane) noexcept nogil:
    """The loop has something else to do. More may follow, in the steps of a task, which nothing tells."""
    plane.stay_end = 0
    plane.stay_rest = STAY_REST


cdef bint is_one_to_store(Plane plane) noexcept nogil:
    """Whether one whole request was received, and nothing else, which is a WRITE, or a FLUSH that may be synced for without Python."""
    cdef const uint8_t *at = <const uint8_t *>plane.received.buf + plane.begin
    cdef Py_ssize_t left = plane.end - plane.begin - plane.request_bytes
    cdef uint16_t command
    if left < 0:
        return False
    memcpy(&command, at + 6, 2)
    command = be16toh(command)
    if command == COMMAND_WRITE:
        return left == <Py_ssize_t>length_of(plane, at)
    # A FLUSH before which something was lost is Python's: it must fail.
    return command == COMMAND_FLUSH and not left and plane.lone_sync == LONE_ALL
