# SPDX-License-Identifier: Apache-2.0
"""`Plane`: all that is known of one connection.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

The class has the fields, and the methods that Python calls. What happens to them is in functions that have the plane as their first
argument; they are in the files of the next parts, one for each subject.
"""

cdef enum Stop:
    STOP_DONE = 0
    STOP_SLOW = 1
    STOP_UNFINISHED = 2
    STOP_BLOCKED = 3
    STOP_TURN_OVER = 4
    STOP_CLOSED = 5
    STOP_FAILED = 6
    STOP_POLLED = 7
    STOP_RECEIVED = 8  # of `serve_on` only: the turn has to go on with what was received last

# What `Plane.turn` returns.
DONE = STOP_DONE  # what was there has been served, and the replies have left
SLOW = STOP_SLOW  # the request at `begin` is for Python
UNFINISHED = STOP_UNFINISHED  # so is the WRITE at `begin`: its file took only `put` bytes, see `error`
BLOCKED = STOP_BLOCKED  # the socket takes no more replies for now
TURN_OVER = STOP_TURN_OVER  # the loop must have its turn before more is done
CLOSED = STOP_CLOSED  # the peer has closed its half
FAILED = STOP_FAILED  # the socket has failed, with `error`
POLLED = STOP_POLLED  # as DONE; the socket was looked at for some time, and nothing came

cdef enum:
    SYNCS_MAX = 256  # so many requests of one turn may wait for a FLUSH of the device

cdef enum:
    # For which requests of a client that is alone a sync may be made within the turn: for none, for its WRITEs with FUA, or for its FLUSHes, too.
    LONE_NOTHING
    LONE_FUA
    LONE_ALL


cdef class Plane:
    """The compiled half of one connection; see the head of `nbdtarget_fast.pyx`.

    Args:
        sock: the descriptor of its socket.
        tls: what encrypts it; None: nothing does.
        received, arena: the two buffers.
        structured: whether replies to READs are structured.
        extended: whether requests have extended headers, and replies, too.
        size: of the export.
        can_write: whether the client was told that it may write.
        flush_for: is called after a turn with what `take_syncs` returns, if any requests wait for a FLUSH. None: the client was not told that it
            may send FLUSH, and FUA with a WRITE.
        zero_min: if a READ of at least this length finds only zeroes, it is answered with a hole.
        length_max: a longer READ or WRITE is left to Python.
        turn_ns: how long a turn lasts at most.
        flush_at: replies are sent when so many bytes of them are there.
        poison: for tests: overwrite what has been served and sent.
        ring_reads: what the connection has to do with reads in the ring, see `nbdtarget.server.ring_reads`; None: there
            are none.
        alone_max: a READ that is alone and no longer than this may begin without regard to the bounds, and may be waited for.

    Attributes:
        begin, end, base, out: see `turns.pxi`.
        error: the errno of FAILED or UNFINISHED.
        put: of UNFINISHED: bytes that the file took.
        is_cut: of FAILED: a part of a reply has left, and the rest of its data could not be read, for the reason of `error`.
        was_batch: more than one request came at once.
        was_late: between two looks at the socket, something else kept the processor for very long; that ends the polling of this turn.
        nr_hits: how many times polling has found something.
        nr_syncs: requests that are done but for a FLUSH of the device; see `take_syncs`.
        loop_fd: a descriptor that is readable when the loop has something to do; -1: there is none.
        stay_ns: so long a client may stay with the thread that syncs (`stays.pxi`).
        stay_idle_ns: so long the thread waits for the client's next request meanwhile.
    """

    cdef int sock
    cdef TlsRecords tls
    cdef Records *records  # of `tls`; NULL: nothing is encrypted
    cdef Py_buffer received
    cdef Py_buffer arena
    cdef bint has_buffers
    cdef bint structured
    cdef bint extended
    cdef const char *request_head  # the first four bytes of a request
    cdef Py_ssize_t request_bytes  # of the header of a request
    cdef Py_ssize_t data_bytes  # of the header of a READ's reply
    cdef Py_ssize_t done_bytes  # of the reply to a WRITE
    cdef bint can_write
    cdef bint poison
    cdef uint64_t size
    cdef uint64_t zero_min
    cdef uint64_t length_max
    cdef int64_t turn_ns
    cdef Py_ssize_t flush_at
    cdef readonly Py_ssize_t begin
    cdef readonly Py_ssize_t end
    cdef readonly Py_ssize_t base
    cdef readonly Py_ssize_t out
    cdef readonly int error
    cdef readonly uint64_t put
    cdef uint64_t put_at  # in the file
    cdef uint64_t put_length
    cdef int nr_put_before  # so many pieces of the same WRITE were written before
    cdef readonly bint is_cut
    cdef File *cut_file
    cdef bint is_stuck  # the socket has not taken all that it was given
    cdef bint has_mapped  # in this turn windows were looked up, and perhaps mapped
    cdef readonly bint was_batch
    cdef readonly bint was_late
    cdef int64_t late_ns  # see `was_late`
    cdef readonly unsigned nr_hits
    cdef unsigned nr_sync_hits  # as `nr_hits`, when a durable request was expected
    cdef object flush_for
    cdef readonly int nr_syncs
    cdef public int loop_fd
    cdef public int64_t stay_ns, stay_idle_ns
    cdef uint64_t sync_cookies[SYNCS_MAX]
    cdef bint sync_is_flush[SYNCS_MAX]
    cdef int lone_sync  # in this turn: LONE_...
    # While the client is with the thread that syncs.
    cdef Way *stay_way
    cdef Stop stay_stop  # why it did not stay longer
    cdef int64_t stay_end
    cdef unsigned stay_rest  # so many syncs more it does not stay
    cdef bint stay_polls  # the thread may look at the socket again and again, before it sleeps
    cdef unsigned spin_skip  # it sleeps at once for so many of the next requests
    cdef unsigned spin_penalty  # what `spin_skip` was set to last
    # What is known of the client's durable requests.
    cdef unsigned sync_credit  # so many turns more a durable request is expected
    cdef unsigned nr_pairs  # how many FLUSHes have followed few WRITEs, up to SYNC_PAIRS
    cdef unsigned nr_unsynced  # WRITEs that no FLUSH has followed yet
    cdef uint64_t unsynced_at  # where in its file the last of them lies
    cdef uint64_t unsynced_length  # 0: nothing of it is left to write back early
    cdef bint is_kick_due  # it has FUA, and was not begun to be written back because a sync for it alone was about to begin
    cdef int64_t turn_end  # when the turn has lasted long enough; 0: the clock was not looked at yet
    # Reads in the ring.
    cdef object ring_reads
    cdef Reader reader
    cdef Uring *uring  # the ring that has them
    cdef Read *begun  # those that were begun in this turn: a list, the last one first
    cdef int64_t nr_begun
    cdef int64_t nr_in_ring  # that were begun in earlier turns
    cdef int64_t nr_left  # so many more requests may be in flight after this turn; -1: that is not known yet
    cdef int64_t bytes_left  # and so many bytes of READs
    cdef bint is_alone  # the READ that has begun is alone: no connection has anything else in flight
    cdef bint waits  # a READ that is alone may be waited for; set by the Receiver
    cdef bint may_wait  # the same, as far as this turn knows
    cdef uint64_t alone_max  # up to which length a READ that is alone is always in bounds
    cdef Counter counter  # of READs, WRITEs, and FLUSHes that needed no Python

    def __init__(self, int sock, received not None, arena not None, *, bint structured, bint can_write, uint64_t size,
                 uint64_t zero_min, uint64_t length_max, int64_t turn_ns, Py_ssize_t flush_at, bint poison, ring_reads=None, uint64_t alone_max=0, flush_for=None, bint extended=False,
                 TlsRecords tls=None):
        self.release()
        self.loop_fd = -1
        self.stay_ns = STAY_NS
        self.stay_idle_ns = STAY_IDLE_NS
        self.tls = tls
        self.records = NULL if tls is None else &tls.records
        choose_clock()
        self.ring_reads = ring_reads
        self.reader.owner = <void *>self
        self.alone_max = alone_max
        PyObject_GetBuffer(received, &self.received, PyBUF_WRITABLE)
        try:
            PyObject_GetBuffer(arena, &self.arena, PyBUF_WRITABLE)
        except BaseException:
            PyBuffer_Release(&self.received)
            raise
        self.has_buffers = True
        self.sock = sock
        self.structured = structured
        self.extended = extended
        self.request_head = EXTENDED_REQUEST_HEAD if extended else REQUEST_HEAD
        self.request_bytes = EXTENDED_REQUEST_BYTES if extended else REQUEST_BYTES
        self.done_bytes = EXTENDED_DONE_BYTES if extended else SIMPLE_BYTES
        self.data_bytes = EXTENDED_DATA_BYTES if extended else DATA_BYTES if structured else SIMPLE_BYTES
        self.can_write = can_write
        self.flush_for = flush_for
        self.size = size
        self.zero_min = zero_min if structured else <uint64_t>-1
        self.length_max = length_max
        self.turn_ns = turn_ns
        self.flush_at = flush_at
        self.poison = poison

    def release(self):
        """Let go of the two buffers; after that, every turn ends with SLOW. Reads that are in the ring go on."""
        self.flush_for = None
        if self.has_buffers:
            self.has_buffers = False
            PyBuffer_Release(&self.received)
            PyBuffer_Release(&self.arena)
        if not self.nr_in_ring:
            self.ring_reads = None  # it refers to the connection

    def __dealloc__(self):
        self.release()

    def counted(self):
        """Return what was answered here, for READs, for WRITEs and for FLUSHes: how many, their bytes, their time in ns, and how many of
        them fell into each bucket (`BOUNDS_NS`, and one more).

        A WRITE with FUA that Python answers counts here with its bytes alone.
        """
        cdef int op, bucket
        add_untimed(&self.counter, self.counter.nr)
        time_passed(&sampling, now_ns())  # after a busy time all batches are timed again
        return tuple(
            (
                self.counter.nr[op],
                self.counter.nr_bytes[op],
                self.counter.times[op].taken_ns,
                [self.counter.times[op].buckets[bucket] for bucket in range(NR_BOUNDS + 1)],
            )
            for op in range(NR_COUNTED)
        )

    def leave_untimed(self, uint32_t nr, usual_ns=None):
        """For tests: the next `nr` batches of this process are not timed.

        Args: usual_ns: so long the last timed batch of this connection has taken, whose time counts for those that are not timed.
        """
        cdef int op
        sampling.nr_untimed, sampling.nr_exact, sampling.since_ns = nr, 0, now_ns()
        if usual_ns is not None:
            self.counter.knows_usual = True
            for op in range(NR_COUNTED):
                self.counter.times[op].usual_ns = usual_ns
                self.counter.times[op].usual_bucket = bucket_of(usual_ns)

    def take_syncs(self):
        """Return the cookies of the WRITEs with FUA that have been written, and those of the FLUSHes.

        The caller has to answer them, after a FLUSH of the device that begins now.
        """
        cdef list writes = [], flushes = []
        cdef int nr
        for nr in range(self.nr_syncs):
            (flushes if self.sync_is_flush[nr] else writes).append(self.sync_cookies[nr])
        self.nr_syncs = 0
        return writes, flushes

    def turn(self, Route route not None, int64_t poll_ns, bint goes_on,
             Py_ssize_t begin, Py_ssize_t end, Py_ssize_t base, Py_ssize_t out, int lone=LONE_NOTHING):
        """Receive, serve and send, until there is a reason to stop. Returns the reason: DONE, SLOW and so on, see above.

        Args:
            poll_ns: after an answer, how long to look at the socket for the next request; 0: not at all.
            goes_on: the event loop has done nothing else since the last call: the turn goes on, and so does its time.
            begin, end, base, out: see `turns.pxi`.
            lone: for tests: LONE_FUA or LONE_ALL: the client is alone.
        """
        self.begin, self.end, self.base, self.out = begin, end, base, out
        self.waits = False
        return take_turn(self, route, poll_ns, goes_on, lone)

    def reads_ended(self, _):
        """Answer the reads that have ended; called by the reader of the ring."""
        cdef Read *first = take_ended(self.uring, &self.reader)
        cdef Read *read = first
        cdef int64_t nr = 0, nr_bytes = 0, now
        cdef list again = []
        cdef BaseException error = None
        if first == NULL:
            return
        if self.has_buffers and self.ring_reads.may_send():
            with nogil:
                send_reads(self, first)
        now = now_ns()
        while read != NULL:
            nr += 1
            if read.result == <int>read.length:
                count_one(&self.counter, COMMAND_READ, read.length, now - read.begun_ns)
            if not self.has_buffers or read.sent == reply_length(read):
                nr_bytes += read.length
            elif read.result != <int>read.length:
                # Python reads it again, and finds out why it failed.
                nr_bytes += read.length
                again.append((read.head[8:16], read.offset, read.length))
            else:
                self.ring_reads.push(unsent_part(read), read.length)
            read = read.next
        error = note_ended(self, first)
        self.nr_in_ring -= nr
        try:
            for cookie, offset, length in again:
                self.ring_reads.read_again(int.from_bytes(cookie, "big"), offset, length)
            self.ring_reads.ended(nr, nr_bytes)
        finally:
            if not self.nr_in_ring:
                if not self.has_buffers:
                    self.ring_reads = None
                Py_DECREF(self)
        if error is not None:
            raise error
