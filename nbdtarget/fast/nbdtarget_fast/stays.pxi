# SPDX-License-Identifier: Apache-2.0
"""Stays: the thread that syncs goes on with a client, in the place of the event loop.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. A sync within the turn (`sync_alone`) takes two threads: the loop's and the Syncer's, and each hands over to the other
for every request. So after its answer the thread of the Syncer goes on in the place of the loop (`serve_on`), while the loop stands still. The
thread waits for what the loop would wait for: the next request of the client, and all other events (`loop_fd` is readable then). It serves
this client alone. The stay ends when something else happens, when the client has sent nothing for `stay_idle_ns`, and when `stay_ns` have passed.

The loop waits for each of these syncs as for the first one. If one takes too long, the loop goes on, and the thread uses nothing of the
connection any more.
"""

cdef enum:
    STAY_NS = 2000000  # how long a stay lasts at most: timers of the loop wait meanwhile
    # So long the thread waits for the next request. Functions that the loop was told to call soon wait meanwhile, too, and the thread cannot know of them.
    STAY_IDLE_NS = 200000
    SPIN_NS = 20000  # so long the thread looks at the socket again and again, before it sleeps
    SPIN_SKIP_MAX = 512  # each time that this was in vain, it sleeps at once for twice as many of the next requests, up to so many
    NOTHING_CAME = -2  # of `receive_next`
    STAY_REST = 16  # for so many syncs after other work of the loop has ended a stay, there is no new one


cdef int64_t serve_on(Plane plane, ssize_t nr_sent, char *answer) noexcept nogil:
    """Serve the client until one of its requests needs a sync. This runs in the thread of the Syncer, which has just sent an answer.

    The loop stands still meanwhile, and waits for the next sync, or for the end of the stay.

    Returns: how many ns ago that request was received, at least 1, and in `answer` the reply to it. 0: the stay is over; `stay_stop` says why.
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
        plane.counter.received_ns = 0  # this batch has ended
        if file.kick_error or file.was_slow or now >= plane.stay_end:
            return 0  # there is something for Python, or for the loop's timers
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
        now = now_ns()  # the Syncer may use another clock, so it gets a difference of two such times
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
            plane.is_kick_due = False
            memcpy(answer, SIMPLE_HEAD, 8)
            cookie = htobe64(plane.sync_cookies[0])
            memcpy(answer + 8, &cookie, 8)
            memcpy(<uint8_t *>plane.arena.buf + plane.out, answer, SIMPLE_BYTES)
            return max(now_ns() - now, 1)


cdef ssize_t receive_next(Plane plane, int64_t began) noexcept nogil:
    """Wait for the client, from now on (`began`), and receive as recv does.

    Returns: as recv. NOTHING_CAME: nothing came for `stay_idle_ns`, or before the stay has to end.
    """
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
    """The loop has something else to do. More work may follow, step by step, which the thread cannot see: so there are no stays for some time."""
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
