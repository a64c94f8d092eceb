# SPDX-License-Identifier: Apache-2.0
"""WRITEs with FUA, and FLUSHes: requests whose replies must wait until data is on the disk.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. Each of them needs a FLUSH of the whole device in the end. A WRITE with FUA is written like a plain one. The cookies of
both are noted, and Python takes them after the turn (`Plane.take_syncs`). It submits one FLUSH of the device for all these WRITEs and one
for all these FLUSHes, and answers the requests when it has ended.

*Writing back begins early.* After a WRITE with FUA the kernel is told at once to begin to write its data back (`kick`), while the thread that
syncs is still busy or asleep. The same happens after plain WRITEs, if the client has sent FLUSHes after one or two WRITEs each so far (SYNC_PAIRS).

*A client that is alone.* In this way, a client that sends one durable request at a time would wait for Python twice, and for two threads that hand
over to each other. So while a FLUSH of the device is no more than a sync of one file (`Route.may_sync` tells), and the file has a `Syncer`, the
sync is made within the turn (`sync_alone`): the thread of the Syncer syncs, and answers the client. The loop waits for it, up to
`FastFile.sync_wait_ns`. If a sync fails, or takes longer, Python goes on: it is told of the sync (`sync_left`), and the request goes the usual way.
"""

cdef enum:
    SYNC_CREDIT = 4  # so many turns after a durable request the next one is expected
    # After so many FLUSHes, each of which has followed PAIR_WRITES WRITEs at most, the next WRITEs are written back early. Where more WRITEs come
    # before a FLUSH, this may cost more than it gains.
    SYNC_PAIRS = 8
    PAIR_WRITES = 2
    UNSYNCED_MAX = 64  # a FLUSH after more WRITEs than this: counting begins anew


cdef inline void note_sync(Plane plane, const uint8_t *request, bint is_flush) noexcept nogil:
    """Note a request that is done but for a FLUSH of the device."""
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
    """Whether one more request may wait for a FLUSH of the device."""
    if plane.nr_syncs == SYNCS_MAX:
        return False
    if plane.lone_sync and not plane.nr_syncs and not plane.nr_begun:
        return True  # a connection may always begin one request, and nothing is in flight
    if plane.nr_left < 0:
        with gil:
            ask_for_room(plane)
    return plane.nr_left > 0


cdef inline void kick_write(Plane plane, File *file, uint64_t at, uint64_t length) noexcept nogil:
    """Have these bytes written back early, if the file wants that."""
    cdef int64_t slow_since
    if file.kicks:
        slow_since = kick(file, at, length)
        if slow_since:
            time_anyway(&plane.counter, slow_since)


cdef void kick_ahead(Plane plane, File *file) noexcept nogil:
    """Have the last WRITE written back early, because a FLUSH is expected to follow it."""
    if plane.unsynced_length:
        kick_write(plane, file, plane.unsynced_at, plane.unsynced_length)
        plane.unsynced_length = 0
    plane.is_kick_due = False


cdef bint sync_alone(Plane plane, Way *way) noexcept nogil:
    """Sync for the one request that was received, and answer it. Returns whether that is done; if not, Python has to do it."""
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
    # Nothing is written back early while the sync runs: the kernel could report an error to that call alone, and the thread would answer that all is well.
    plane.unsynced_length = 0
    plane.is_kick_due = False
    # With TLS the thread sends nothing, because the loop has to encrypt it.
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
    """The sync for the request has succeeded. Its reply lies in the arena, at `out`, and `sent` bytes of it have left."""
    file.nr_synced += 1
    plane.nr_syncs = 0
    plane.counter.nr[COUNTED_FLUSH if plane.sync_is_flush[0] else COMMAND_WRITE] += 1
    plane.base += sent
    plane.out += SIMPLE_BYTES
