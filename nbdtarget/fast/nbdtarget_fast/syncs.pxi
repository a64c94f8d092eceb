# SPDX-License-Identifier: Apache-2.0
"""WRITEs with FUA, and FLUSHes: requests whose replies must wait until data is on the disk.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. Each of them needs a FLUSH of the whole device in the end. A WRITE with FUA is written like a plain one. The cookies of
both are noted, and Python takes them after the turn (`Plane.take_syncs`). It submits one FLUSH of the device for all these WRITEs and one
for all these FLUSHes, and answers the requests when it has ended.

*Writing back begins at once.* After a WRITE with FUA the kernel is told to begin to write its data back (`kick`), while the thread that syncs is busy
or asleep. The same happens after plain WRITEs of a client that has sent a FLUSH after each one or two WRITEs so far (SYNC_PAIRS).

*A client that is alone.* If it asks for one durable thing at a time, it would wait for Python twice, and for two threads that hand over to each
other. So while a FLUSH of the device is no more than a sync of one file (`Route.may_sync` tells), and the file has a `Syncer`, the sync is
made within the turn (`sync_alone`): the thread of the Syncer syncs, and answers the client. The loop waits for it, up to `FastFile.sync_wait_ns`.
A sync that fails, or takes longer, is Python's: it is told of the sync (`sync_left`), and the request goes the usual way.
"""

cdef enum:
    SYNC_CREDIT = 4  # so many turns after a durable request the next one is expected
    # So many times a FLUSH has followed one or two WRITEs: their writing back begins at once. For more WRITEs this may cost more than it gains.
    SYNC_PAIRS = 8
    PAIR_WRITES = 2
    UNSYNCED_MAX = 64


cdef inline void note_sync(Plane plane, const uint8_t *request, bint is_flush) noexcept nogil:
    cdef uint64_t cookie
    memcpy(&cookie, request + 8, 8)
    plane.sync_cookies[plane.nr_syncs] = be64toh(cookie)
    plane.sync_is_flush[plane.nr_syncs] = is_flush
    plane.nr_syncs += 1
    plane.sync_credit = SYNC_CREDIT
    time_anyway(&plane.counter, 0)
    if is_flush:
        if plane.nr_unsynced > UNSYNCED_MAX:
            plane.nr_pairs = plane.nr_unsynced = 0
        elif plane.nr_unsynced > PAIR_WRITES:
            plane.nr_unsynced -= PAIR_WRITES
        else:
            plane.nr_pairs = min(plane.nr_pairs + 1, <unsigned>SYNC_PAIRS)
            plane.nr_unsynced = 0
    if plane.nr_left > 0:
        plane.nr_left -= 1


cdef bint has_room_for_sync(Plane plane) noexcept nogil:
    if plane.nr_syncs == SYNCS_MAX:
        return False
    if plane.lone_sync and not plane.nr_syncs and not plane.nr_begun:
        return True  # a connection may always begin one request, and nothing is in flight
    if plane.nr_left < 0:
        with gil:
            ask_for_room(plane)
    return plane.nr_left > 0


cdef inline void kick_write(Plane plane, File *file, uint64_t at, uint64_t length) noexcept nogil:
    cdef int64_t slow_since
    if file.kicks:
        slow_since = kick(file, at, length)
        if slow_since:
            time_anyway(&plane.counter, slow_since)


cdef void kick_ahead(Plane plane, File *file) noexcept nogil:
    """After a WRITE for which a FLUSH is expected."""
    if plane.unsynced_length:
        kick_write(plane, file, plane.unsynced_at, plane.unsynced_length)
        plane.unsynced_length = 0


cdef bint sync_alone(Plane plane, Way *way) noexcept nogil:
    """Sync for the one request that was received, and answer it. False: it is Python's."""
    cdef File *file = way.file
    cdef uint8_t *reply = <uint8_t *>plane.arena.buf + plane.out
    cdef bint is_flush = plane.sync_is_flush[0]
    cdef uint64_t cookie = htobe64(plane.sync_cookies[0])
    cdef int status
    cdef ssize_t sent = 0
    if (
        file.job == NULL or plane.was_batch or plane.end > plane.begin or plane.nr_begun or file.kick_error
        or is_flush and plane.lone_sync != LONE_ALL or plane.out + SIMPLE_BYTES > plane.arena.len
    ):
        kick_ahead(plane, file)
        return False
    memcpy(reply, SIMPLE_HEAD, 8)
    memcpy(reply + 8, &cookie, 8)
    plane.stay_way = NULL
    if plane.stay_rest:
        plane.stay_rest -= 1
    elif plane.records == NULL and plane.loop_fd >= 0:
        plane.stay_way = way
        plane.stay_end = now_ns() + plane.stay_ns
    # Nothing is kicked beside the sync: an error could be told to the kick alone, and the thread would answer that all is well.
    plane.unsynced_length = 0
    # What must be encrypted is for the loop to send.
    sync_begin(
        file.job, plane.sock, reply, 0 if plane.records != NULL else SIMPLE_BYTES,
        <sync_next>serve_on if plane.stay_way != NULL else NULL, <void *>plane,
    )
    status = sync_end(file.job, file.sync_wait_ns, &sent)
    if status:
        file.is_left = True
        file.job = NULL
        return False
    if plane.stay_way == NULL:
        sync_answered(plane, file, sent)
    return True


cdef void sync_answered(Plane plane, File *file, Py_ssize_t sent) noexcept nogil:
    """The request is synced for, and so much of the answer was sent, which lies in the arena, at `out`."""
    file.nr_synced += 1
    plane.nr_syncs = 0
    plane.counter.nr[COUNTED_FLUSH if plane.sync_is_flush[0] else COMMAND_WRITE] += 1
    plane.base += sent
    plane.out += SIMPLE_BYTES
