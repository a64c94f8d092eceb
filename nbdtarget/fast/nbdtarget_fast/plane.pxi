# SPDX-License-Identifier: Apache-2.0
"""Connections. It is a part of `nbdtarget_fast`."""

cdef enum Stop:
    STOP_DONE = 0
    STOP_SLOW = 1
    STOP_UNFINISHED = 2
    STOP_BLOCKED = 3
    STOP_TURN_OVER = 4
    STOP_CLOSED = 5
    STOP_FAILED = 6
    STOP_POLLED = 7
    STOP_RECEIVED = 8  # of `_serve_on` only: what was received last is for the turn

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
    SYNCS_MAX = 256  # requests whose replies wait for one FLUSH of the device
    # Between two looks at the clock. Each request counts as so many bytes more than it has.
    LOOK_BYTES = 262144
    REQUEST_WEIGHT = 4096
    POLL_GAP_NS = 20000  # between two looks at the socket: others want the processor
    LARGE = 32768  # what is left of a WRITE that is received apart
    BEHIND_LARGE = 4096  # so much is received behind it
    # A READ that is alone, and misses the page cache, is waited for. This does not pay off for a slow disk: each time that
    # it does not, twice as many READs are not waited for.
    WAIT_NS = 250000
    STAY_NS = 2000000  # a client may stay with the thread that syncs for so long: timers of the loop wait meanwhile
    # So long it waits there for the next request. What the loop was told to call soon waits meanwhile, too, and nothing tells the thread of that.
    STAY_IDLE_NS = 200000
    SPIN_NS = 20000  # so long the thread looks at the socket again and again, before it sleeps
    SPIN_SKIP_MAX = 512  # each time that it was in vain, twice as many requests are waited for asleep
    NOTHING_CAME = -2
    STAY_REST = 16  # so many syncs after it was ended by something else, it does not stay
    SYNC_CREDIT = 4  # so many turns after a durable request the next one is expected
    # So many times a FLUSH has followed one or two WRITEs: their writing back begins at once. For more WRITEs this may cost more than it gains.
    SYNC_PAIRS = 8
    PAIR_WRITES = 2
    UNSYNCED_MAX = 64
    WAIT_SKIP_MAX = 64
    GATHER_PIECES = 128  # of one sendmsg: two for each reply
    PLACES_MAX = 80  # of one reply in windows: its pieces, and where one of them leaves a window
    ZERO_LOOK = 4096  # so much of the end of a READ tells in most cases that it is no hole

cdef enum:
    # What of a client that is alone may be synced for without Python: nothing, its WRITEs with FUA, or its FLUSHes, too.
    LONE_NOTHING
    LONE_FUA
    LONE_ALL

cdef enum Mapped:
    # What became of a READ that was to be sent from a mapping.
    MAPPED_NOT  # it takes the usual way
    MAPPED_SENT  # it has been sent, or the rest of it is in the arena
    MAPPED_SLOW  # it is for Python, and nothing of its reply has left
    MAPPED_FAILED  # the socket has failed, with `error`, or the rest of a reply is lost


cdef class Plane:
    """The compiled half of one connection; see the module head.

    Args:
        sock: the descriptor of its socket.
        tls: what encrypts it; None: nothing does.
        received, arena: the two buffers.
        structured: whether replies to READs are structured.
        extended: whether requests have extended headers, and replies, too.
        size: of the export.
        can_write: whether the client was told that it may write.
        flush_for: takes the answer of `take_syncs`, if there is one, after each turn. None: the client was not told that it may send FLUSH,
            and FUA with a WRITE.
        zero_min: from which length a READ is looked through for zeroes, which are answered as a hole.
        length_max: a longer READ or WRITE is left to Python.
        turn_ns: how long a turn lasts at most.
        flush_at: replies are sent when so many bytes of them are there.
        poison: for tests: overwrite what has been served and sent.
        ring_reads: what the connection has to do with reads in the ring, see `nbdtarget.server.ring_reads`; None: there
            are none.
        alone_max: up to which length a READ that is alone may begin whatever the bounds are, and is waited for.

    Attributes:
        begin, end, base, out: see the module head.
        error: the errno of FAILED or UNFINISHED.
        put: of UNFINISHED: bytes that the file took.
        is_cut: of FAILED: a part of a reply has left, and the rest of its data could not be read, for the reason of `error`.
        was_batch: more than one request came at once.
        was_late: the processor was given away for a look, and came back late; that ends the polling of this turn.
        nr_hits: how many times polling has found something.
        nr_syncs: requests that are done but for a FLUSH of the device; see `take_syncs`.
        loop_fd: is readable when the loop has something to do; -1: nothing tells that.
        stay_ns: so long a client may stay with the thread that syncs.
        stay_idle_ns: so long the thread waits for its next request meanwhile.
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
    cdef int nr_put_before  # pieces of the same WRITE
    cdef readonly bint is_cut
    cdef File *cut_file
    cdef bint is_stuck  # the socket has not taken all that it was given
    cdef bint has_mapped  # in this turn
    cdef readonly bint was_batch
    cdef readonly bint was_late
    cdef int64_t late_ns
    cdef readonly unsigned nr_hits
    cdef unsigned nr_sync_hits
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
    cdef bint stay_polls
    cdef unsigned spin_skip  # so many requests are waited for asleep
    cdef unsigned spin_penalty
    cdef unsigned sync_credit  # so many turns more a durable request is expected
    cdef unsigned nr_pairs  # times that a FLUSH has followed few WRITEs
    cdef unsigned nr_unsynced  # WRITEs to which no FLUSH was counted yet
    cdef uint64_t unsynced_at  # of the last of them
    cdef uint64_t unsynced_length
    cdef int64_t turn_end  # 0: the clock was not looked at in this turn of the loop
    # Reads in the ring.
    cdef object ring_reads
    cdef Reader reader
    cdef Uring *uring  # that has them
    cdef Read *begun  # in this turn: a list, the last one first
    cdef int64_t nr_begun
    cdef int64_t nr_in_ring  # that were begun in earlier turns
    cdef int64_t nr_left  # so many more may begin in this turn, -1: that is not known yet
    cdef int64_t bytes_left
    cdef bint is_alone  # the READ that has begun is alone: no connection has anything else in flight
    cdef bint waits  # for a READ that is alone; set by the Receiver
    cdef bint may_wait  # in this turn
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
        """For tests: it is not the turn of the next `nr` batches of this process to be timed.

        Args: usual_ns: so long has the last one of this connection taken that stands for others.
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

        They are the caller's to answer, after a FLUSH of the device that begins now.
        """
        cdef list writes = [], flushes = []
        cdef int nr
        for nr in range(self.nr_syncs):
            (flushes if self.sync_is_flush[nr] else writes).append(self.sync_cookies[nr])
        self.nr_syncs = 0
        return writes, flushes

    cdef inline void _note_sync(self, const uint8_t *request, bint is_flush) noexcept nogil:
        cdef uint64_t cookie
        memcpy(&cookie, request + 8, 8)
        self.sync_cookies[self.nr_syncs] = be64toh(cookie)
        self.sync_is_flush[self.nr_syncs] = is_flush
        self.nr_syncs += 1
        self.sync_credit = SYNC_CREDIT
        time_anyway(&self.counter, 0)
        if is_flush:
            if self.nr_unsynced > UNSYNCED_MAX:
                self.nr_pairs = self.nr_unsynced = 0
            elif self.nr_unsynced > PAIR_WRITES:
                self.nr_unsynced -= PAIR_WRITES
            else:
                self.nr_pairs = min(self.nr_pairs + 1, <unsigned>SYNC_PAIRS)
                self.nr_unsynced = 0
        if self.nr_left > 0:
            self.nr_left -= 1

    def turn(self, Route route not None, int64_t poll_ns, bint goes_on,
             Py_ssize_t begin, Py_ssize_t end, Py_ssize_t base, Py_ssize_t out, int lone=LONE_NOTHING):
        """Receive, serve and send, until one of the stops above.

        Args:
            poll_ns: after an answer, how long to look at the socket for the next request; 0: not at all.
            goes_on: the loop had no turn since the last call.
            begin, end, base, out: see the module head.
            lone: for tests: the client is alone: LONE_FUA, LONE_ALL.
        """
        self.begin, self.end, self.base, self.out = begin, end, base, out
        self.waits = False
        return self._go(route, poll_ns, goes_on, lone)

    cdef int _go(self, Route route, int64_t poll_ns, bint goes_on, int lone) except -1:
        """As `turn`, with the places where they are."""
        cdef Stop stop
        cdef FastFile cut
        cdef uint64_t nr_reads, nr_writes
        self.lone_sync = LONE_NOTHING
        if lone and route.file._syncer is not None and route.may_sync is not None and route.may_sync():
            self.lone_sync = lone
        if not self.has_buffers or not route.note_locked():
            self.was_batch = False
            self.nr_hits = self.nr_sync_hits = 0
            return STOP_SLOW
        if not (0 <= self.begin <= self.end <= self.received.len and 0 <= self.base <= self.out <= self.arena.len):
            raise ValueError("these places lie outside of the buffers")
        if not goes_on:
            self.turn_end = 0
        self.nr_left = -1 if self.ring_reads is not None else 0
        with nogil:
            stop = self._turn(&route.way, poll_ns)
        if stop == STOP_DONE and self._has_pending():
            stop = STOP_TURN_OVER  # a FLUSH comes first, and the loop would not call again
        if route.way.nr_noted:
            route.tell_hits()
        if self.nr_begun:
            self._note_begun(route)
            if self.reader.first != NULL:
                self.reads_ended(0)  # it was waited for, and has failed
        if route.file.file.kick_error:
            route.file.kick_failed(route.file.file.kick_error)
            route.file.file.kick_error = 0
        if route.file.file.is_left:
            route.file.file.is_left = False
            route.file.sync_left()
        if route.file.file.was_slow:
            route.file.file.was_slow = False
            route.file.was_slow()
        if self.has_mapped:
            self.has_mapped = False
            route.tell_windows()
        if self.is_cut and self.cut_file != NULL:
            cut, self.cut_file = route.file_of(self.cut_file), NULL
            if cut.read_failed is not None:
                cut.read_failed(self.error)
        nr_reads, nr_writes = route.way.nr_reads, route.way.nr_writes
        route.way.nr_reads = route.way.nr_writes = 0
        if route.was_served is not None and (nr_reads or nr_writes):
            route.was_served(nr_reads, nr_writes)
        if stop == STOP_UNFINISHED:
            route.file.was_unfinished(self.put_at, self.put_length, self.put, self.error, self.nr_put_before)
        return stop

    cdef Stop _turn(self, Way *way, int64_t poll_ns) noexcept nogil:
        global nr_batches
        cdef Stop stop
        cdef ssize_t got
        cdef uint8_t *into = <uint8_t *>self.received.buf
        cdef int64_t began = 0, looked = 0, ended = 0, now
        cdef bint has_replies, is_lone
        cdef bint is_received = self.end > self.begin  # begin with that
        self.was_batch = False
        self.was_late = False
        self.is_stuck = self.is_cut = False
        self.nr_hits = self.nr_sync_hits = 0
        self.may_wait = poll_ns > 0 or self.waits
        while True:
            if is_received:
                is_received = False
                begin_batch(&self.counter, &sampling, 0)
            else:
                if self.end == self.received.len:
                    if not self.begin:
                        return STOP_SLOW  # one request that does not fit: it gets memory of its own
                    self._compact()
                got = self._receive(into + self.end, self._room())
                if got < 0:
                    if errno == EINTR:
                        continue
                    if errno != EAGAIN:
                        self.error = errno
                        return STOP_FAILED
                    if not poll_ns:
                        return STOP_DONE
                    # Right after an answer the time is known: a look less.
                    now, ended = ended or now_ns(), 0
                    if not began:
                        began = now
                    elif now - began > poll_ns or now - looked > POLL_GAP_NS:
                        return STOP_POLLED
                    sched_yield()
                    looked = now_ns()
                    if looked - now > self.late_ns:
                        self.was_late = True
                        poll_ns = 0
                    continue
                if not got:
                    return STOP_CLOSED
                # What was polled for has come a moment ago. A durable request is about to be timed anyway, from its beginning.
                begin_batch(&self.counter, &sampling, looked if began else now_ns() if self.sync_credit else 0)
                if began:
                    began = 0
                    if self.sync_credit:
                        self.nr_sync_hits += 1
                    else:
                        self.nr_hits += 1
                self.end += got
                nr_batches += 1
                if got > self.request_bytes and self._is_batch():
                    self.was_batch = True
                    self.may_wait = False
                    poll_ns = 0
            stop = self._serve(way)
            if self.nr_begun and self.uring.nr_new:
                if stop == STOP_DONE and self._waits_for_it():
                    self._wait()
                else:
                    submit(self.uring)
            has_replies = self.out > self.base
            is_lone = self.nr_syncs == 1 and stop == STOP_DONE and self.lone_sync and not has_replies
            self.stay_polls = poll_ns > 0
            if is_lone and self._sync_alone(way):
                has_replies = True  # though it may have left
                if self.stay_way != NULL:
                    poll_ns = 0  # there was more time than for that
                    stop = self.stay_stop
                    if stop == STOP_RECEIVED:
                        is_received = True
                        continue
                    if stop == STOP_CLOSED:
                        return stop
            if stop == STOP_SLOW or stop == STOP_UNFINISHED or stop == STOP_FAILED or stop == STOP_BLOCKED:
                end_batch(&self.counter, &sampling)
                return stop
            if has_replies and not self._send():
                end_batch(&self.counter, &sampling)
                return STOP_FAILED if self.error else STOP_BLOCKED
            if self.nr_unsynced == 1 and self.nr_pairs == SYNC_PAIRS:
                self._kick_ahead(way.file)
            now = end_batch(&self.counter, &sampling)
            # The rest of a request is on its way.
            if stop != STOP_DONE or self.nr_syncs or has_replies and not poll_ns and self.begin == self.end and not self._has_pending():
                return stop
            now = ended = now or now_ns()
            # A peer at depth 1 must not keep the loop for ever.
            if self._is_over(now):
                return STOP_TURN_OVER

    cdef inline ssize_t _receive(self, uint8_t *into, size_t room) noexcept nogil:
        """As recv."""
        if self.records != NULL:
            return tls_receive(self.records, into, room)
        return socket_recv(self.sock, into, room, MSG_DONTWAIT)

    cdef inline bint _has_pending(self) noexcept nogil:
        """Whether TLS has bytes that the loop does not know of."""
        return self.records != NULL and tls_has_pending(self.records)

    cdef inline ssize_t _put(self, const iovec *pieces, size_t nr_pieces) noexcept nogil:
        """As sendmsg. With TLS, after EAGAIN or a part, the next call must begin with the same bytes: they do, in the queue of `Output`, too."""
        cdef msghdr message
        if self.records != NULL:
            return tls_send(self.records, pieces, nr_pieces)
        if nr_pieces == 1:
            return socket_send(self.sock, pieces.iov_base, pieces.iov_len, MSG_DONTWAIT | MSG_NOSIGNAL)
        memset(&message, 0, sizeof(message))
        message.msg_iov = <iovec *>pieces
        message.msg_iovlen = nr_pieces
        return sendmsg(self.sock, &message, MSG_DONTWAIT | MSG_NOSIGNAL)

    cdef Py_ssize_t _room(self) noexcept nogil:
        """How much to receive. Behind a large WRITE it is little, so that the next one begins where this one did.

        The buffer stays in the processor's cache then, and nothing large is ever moved.
        """
        cdef Py_ssize_t room = self.received.len - self.end
        cdef Py_ssize_t left
        cdef const uint8_t *at = <const uint8_t *>self.received.buf + self.begin
        cdef uint16_t command
        if self.end - self.begin < self.request_bytes:
            return room
        memcpy(&command, at + 6, 2)
        left = self.request_bytes + <Py_ssize_t>self._length(at) - (self.end - self.begin)
        if be16toh(command) == COMMAND_WRITE and LARGE < left and left + BEHIND_LARGE < room:
            return left + BEHIND_LARGE
        return room

    cdef inline bint _is_over(self, int64_t now) noexcept nogil:
        """Whether this turn has lasted long enough. The first look begins it."""
        if not self.turn_end:
            self.turn_end = now + self.turn_ns
        return now > self.turn_end

    cdef inline uint32_t _length(self, const uint8_t *request) noexcept nogil:
        """The length of a request; UINT32_MAX if it needs more than 32 bits, which no READ and no WRITE of ours does."""
        cdef uint32_t length, high
        if self.extended:
            memcpy(&high, request + 24, 4)
            if high:
                return UINT32_MAX
            memcpy(&length, request + 28, 4)
        else:
            memcpy(&length, request + 24, 4)
        return be32toh(length)

    cdef inline bint _is_batch(self) noexcept nogil:
        """Whether more than one request lies in the receive buffer."""
        cdef const uint8_t *at = <const uint8_t *>self.received.buf + self.begin
        cdef Py_ssize_t left = self.end - self.begin - self.request_bytes
        cdef uint16_t command
        if left <= 0:
            return False
        memcpy(&command, at + 6, 2)
        return be16toh(command) != COMMAND_WRITE or left > <Py_ssize_t>self._length(at)

    cdef bint _send(self) noexcept nogil:
        """Send the replies; whether all have left. If not, `error` is 0, or the socket has failed."""
        cdef uint8_t *arena = <uint8_t *>self.arena.buf
        cdef iovec place
        cdef ssize_t sent
        self.error = 0
        while self.base < self.out:
            place.iov_base = arena + self.base
            place.iov_len = self.out - self.base
            sent = self._put(&place, 1)
            if sent < 0:
                if errno == EINTR:
                    continue
                if errno != EAGAIN:
                    self.error = errno
                self.is_stuck = True
                return False
            self.base += sent
        self._all_sent(self.out)
        return True

    cdef inline void _all_sent(self, Py_ssize_t used) noexcept nogil:
        """All replies have left; so many bytes of the arena were used for them."""
        if self.poison:
            memset(self.arena.buf, 0xdb, used)
        self.base = self.out = 0
        self.is_stuck = False

    cdef void _compact(self) noexcept nogil:
        """Make room behind `end`."""
        cdef uint8_t *received = <uint8_t *>self.received.buf
        cdef Py_ssize_t left = self.end - self.begin
        if not self.begin:
            return
        if left:
            memmove(received, received + self.begin, left)
        if self.poison:
            memset(received + left, 0xdb, self.end - left)
        self.begin = 0
        self.end = left

    cdef void _make_room_for(self, Py_ssize_t size) noexcept nogil:
        """A request of so many bytes begins at `begin`, and the rest of it is still to come.

        It is moved only if it would not fit where it lies: moving costs as much as receiving.
        """
        if self.begin + size > self.received.len:
            self._compact()

    cdef Stop _make_room(self) noexcept nogil:
        """The arena has no room for one more reply: send. STOP_DONE: there is room."""
        if self._send():
            return STOP_DONE
        return STOP_FAILED if self.error else STOP_BLOCKED

    cdef Stop _serve(self, Way *way) noexcept nogil:
        """Serve what is received. DONE: all of it, but for the beginning of one more request."""
        cdef uint8_t *received = <uint8_t *>self.received.buf
        cdef uint8_t *arena = <uint8_t *>self.arena.buf
        cdef uint8_t *at
        cdef uint8_t *reply
        cdef uint16_t flags, command
        cdef uint32_t length
        cdef uint64_t offset, file_at = 0
        cdef uint64_t size = self.size if self.size < way.size else way.size
        cdef Py_ssize_t head = self.data_bytes, request_bytes = self.request_bytes
        cdef int64_t look_left = LOOK_BYTES
        cdef File *file
        cdef Piece pieces[MIXED_MAX]
        cdef int nr_hits, nr_pieces
        cdef Stop stop
        cdef Found found
        cdef Mapped mapped
        while self.end - self.begin >= request_bytes:
            at = received + self.begin
            memcpy(&flags, at + 4, 2)
            memcpy(&command, at + 6, 2)
            memcpy(&offset, at + 16, 8)
            command = be16toh(command)
            offset = be64toh(offset)
            length = self._length(at)
            if self.extended and command == COMMAND_WRITE:
                flags &= be16toh(0xFFFF ^ FLAG_PAYLOAD_LEN)
            if command == COMMAND_FLUSH and self.flush_for is not None and not flags and not offset and not length:
                # Those of a batch share one FLUSH of the device, after all WRITEs of the batch.
                if memcmp(at, self.request_head, 4) != 0 or not self._has_room_for_sync():
                    return STOP_SLOW
                self._note_sync(at, True)
                self.begin += request_bytes
                continue
            if (
                memcmp(at, self.request_head, 4) != 0
                or flags and not self._is_durable_write(way, flags, command)
                or command > COMMAND_WRITE
                or not length
                or length > self.length_max
                or not lies_in(offset, length, size)
            ):
                return STOP_SLOW
            if command == COMMAND_WRITE:
                if not self.can_write:
                    return STOP_SLOW
                if self.end - self.begin - request_bytes < <int64_t>length:
                    # Its payload is on its way. What does not fit gets memory of its own.
                    if request_bytes + <int64_t>length > self.received.len:
                        return STOP_SLOW
                    self._make_room_for(request_bytes + <Py_ssize_t>length)
                    return STOP_DONE
                if self.out + self.done_bytes > self.arena.len:
                    stop = self._make_room()
                    if stop != STOP_DONE:
                        return stop
                file = find(way, offset, length, True, &file_at)
                if file == NULL:
                    stop = self._write_pieces(way, at + request_bytes, offset, length)
                    if stop != STOP_DONE:
                        return stop
                elif not file_takes(file, file_at, length):
                    return STOP_SLOW
                elif not self._write(file, at + request_bytes, file_at, length, 0):
                    return STOP_UNFINISHED
                self.counter.nr_bytes[COMMAND_WRITE] += length
                if flags:
                    if file == NULL:
                        self.unsynced_length = 0
                    elif self.lone_sync and self.end - self.begin == request_bytes + <Py_ssize_t>length:
                        # If it is synced for at once, the sync begins the writing back.
                        self.unsynced_at, self.unsynced_length = file_at, length
                    else:
                        self._kick(file, file_at, length)
                    self._note_sync(at, False)
                else:
                    self.nr_unsynced += 1
                    self.unsynced_at, self.unsynced_length = file_at, length if file != NULL else 0
                    if self.was_batch and self.nr_pairs == SYNC_PAIRS:
                        self._kick_ahead(way.file)
                    self.counter.nr[COMMAND_WRITE] += 1
                    self._pack_done(arena + self.out, at)
                    self.out += self.done_bytes
                self.begin += request_bytes + length
                way.nr_writes += 1
            else:
                if head + <int64_t>length + HOLE_BYTES > self.arena.len:
                    return STOP_SLOW
                if self.out + head + <int64_t>length + HOLE_BYTES > self.arena.len:
                    stop = self._make_room()
                    if stop != STOP_DONE:
                        return stop
                file = find(way, offset, length, False, &file_at)
                reply = arena + self.out
                if file == NULL:
                    nr_hits = find_pieces(way, offset, length, False, pieces)
                    nr_pieces = join_pieces(pieces, nr_hits)
                else:
                    pieces[0].file, pieces[0].at, pieces[0].length = file, file_at, length
                    nr_hits = nr_pieces = 1
                mapped = MAPPED_NOT
                if nr_pieces and length >= pieces[0].file.mapping.length_min:
                    mapped = self._send_mapped(pieces, nr_pieces, reply, at, length)
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
                        self.out += self._pack_read(reply, at, length)
                    if way.kind == KIND_TABLE:
                        way.nr_reads += nr_hits - 1  # a hit for each block
                    self.counter.nr[COMMAND_READ] += 1
                    self.counter.nr_bytes[COMMAND_READ] += length
                elif found == REFUSED or not self._miss(way, file, at, offset, file_at, length):
                    return STOP_SLOW
                self.begin += request_bytes
                way.nr_reads += 1
                # Let the client begin to work on what is there.
                if self.out - self.base >= self.flush_at and not self._send() and self.error:
                    return STOP_FAILED
            look_left -= length + REQUEST_WEIGHT
            if look_left < 0:
                look_left = LOOK_BYTES
                if self._is_over(now_ns()):
                    return STOP_TURN_OVER
        self._compact()
        return STOP_DONE

    cdef inline bint _write(
        self, File *file, const uint8_t *data, uint64_t at, uint64_t length, int nr_before
    ) noexcept nogil:
        """Returns whether the page cache took all of it; if not, what it took is noted for UNFINISHED."""
        cdef int64_t slow_since = 0
        cdef uint64_t put = file_write(file, data, at, length, &self.error, &slow_since)
        if slow_since:
            time_anyway(&self.counter, slow_since)
        if put == length:
            return True
        self.put, self.put_at, self.put_length, self.nr_put_before = put, at, length, nr_before
        return False

    cdef Stop _write_pieces(self, Way *way, const uint8_t *data, uint64_t offset, uint64_t length) noexcept nogil:
        """Carry out a WRITE that goes to several places, if all of them are known. It may end in the midst of them, as UNFINISHED."""
        cdef Piece pieces[MIXED_MAX]
        cdef int nr_pieces = find_pieces(way, offset, length, True, pieces)
        cdef int nr
        if not nr_pieces:
            return STOP_SLOW
        for nr in range(nr_pieces):
            # All of them are in the file that `was_unfinished` is told of.
            if pieces[nr].file != way.file or length > way.file.write_max:
                return STOP_SLOW
            if not file_takes(way.file, pieces[nr].at, pieces[nr].length):
                return STOP_SLOW
        for nr in range(nr_pieces):
            # Python cuts it in the same way, so the device gets these pieces again, one after the other.
            if not self._write(way.file, data, pieces[nr].at, pieces[nr].length, nr):
                return STOP_UNFINISHED
            data += pieces[nr].length
        if way.kind == KIND_TABLE:
            way.nr_writes += nr_pieces - 1  # a hit for each block
        return STOP_DONE

    cdef inline bint _is_durable_write(self, const Way *way, uint16_t flags, uint16_t command) noexcept nogil:
        """Whether it is a WRITE with FUA that may be carried out as a WRITE, and a FLUSH of the device.

        A cache has several devices, and a FLUSH of it costs more.
        """
        return (
            command == COMMAND_WRITE and be16toh(flags) == FLAG_FUA and self.flush_for is not None
            and way.kind != KIND_TABLE and self._has_room_for_sync()
        )

    cdef bint _has_room_for_sync(self) noexcept nogil:
        if self.nr_syncs == SYNCS_MAX:
            return False
        if self.lone_sync and not self.nr_syncs and not self.nr_begun:
            return True  # a connection may always begin one request, and nothing is in flight
        if self.nr_left < 0:
            with gil:
                self._ask_for_room()
        return self.nr_left > 0

    cdef inline void _kick(self, File *file, uint64_t at, uint64_t length) noexcept nogil:
        cdef int64_t slow_since
        if file.kicks:
            slow_since = kick(file, at, length)
            if slow_since:
                time_anyway(&self.counter, slow_since)

    cdef void _kick_ahead(self, File *file) noexcept nogil:
        """After a WRITE for which a FLUSH is expected."""
        if self.unsynced_length:
            self._kick(file, self.unsynced_at, self.unsynced_length)
            self.unsynced_length = 0

    cdef bint _sync_alone(self, Way *way) noexcept nogil:
        """Sync for the one request that was received, and answer it. False: it is Python's."""
        cdef File *file = way.file
        cdef uint8_t *reply = <uint8_t *>self.arena.buf + self.out
        cdef bint is_flush = self.sync_is_flush[0]
        cdef uint64_t cookie = htobe64(self.sync_cookies[0])
        cdef int status
        cdef ssize_t sent = 0
        if (
            file.job == NULL or self.was_batch or self.end > self.begin or self.nr_begun or file.kick_error
            or is_flush and self.lone_sync != LONE_ALL or self.out + SIMPLE_BYTES > self.arena.len
        ):
            self._kick_ahead(file)
            return False
        memcpy(reply, SIMPLE_HEAD, 8)
        memcpy(reply + 8, &cookie, 8)
        self.stay_way = NULL
        if self.stay_rest:
            self.stay_rest -= 1
        elif self.records == NULL and self.loop_fd >= 0:
            self.stay_way = way
            self.stay_end = now_ns() + self.stay_ns
        # Nothing is kicked beside the sync: an error could be told to the kick alone, and the thread would answer that all is well.
        self.unsynced_length = 0
        # What must be encrypted is for the loop to send.
        sync_begin(
            file.job, self.sock, reply, 0 if self.records != NULL else SIMPLE_BYTES,
            <sync_next>serve_on if self.stay_way != NULL else NULL, <void *>self,
        )
        status = sync_end(file.job, file.sync_wait_ns, &sent)
        if status:
            file.is_left = True
            file.job = NULL
            return False
        if self.stay_way == NULL:
            self._answered(file, sent)
        return True

    cdef void _answered(self, File *file, Py_ssize_t sent) noexcept nogil:
        """The request is synced for, and so much of the answer was sent, which lies in the arena, at `out`."""
        file.nr_synced += 1
        self.nr_syncs = 0
        self.counter.nr[COUNTED_FLUSH if self.sync_is_flush[0] else COMMAND_WRITE] += 1
        self.base += sent
        self.out += SIMPLE_BYTES

    cdef int64_t _serve_on(self, ssize_t nr_sent, char *answer) noexcept nogil:
        """In the thread of the Syncer, which has answered: serve until a request needs a sync. Returns how many ns ago that was received, at least 1; 0: there is none.

        The loop stands still, and waits for the next sync, or the end.
        """
        cdef Way *way = self.stay_way
        cdef File *file = way.file
        cdef uint64_t cookie
        cdef ssize_t got
        cdef int64_t now
        global nr_batches
        self._answered(file, max(nr_sent, 0))
        while True:
            self.stay_stop = STOP_DONE
            if not self._send():
                self.stay_stop = STOP_FAILED if self.error else STOP_BLOCKED
                return 0
            if self.nr_unsynced == 1 and self.nr_pairs == SYNC_PAIRS:
                self._kick_ahead(file)
            now = end_batch(&self.counter, &sampling) or now_ns()
            self.counter.received_ns = 0  # it has ended
            if file.kick_error or file.was_slow or now >= self.stay_end:
                return 0  # for Python, or for timers
            got = self._receive_next(now)
            if got == NOTHING_CAME:
                return 0
            if got <= 0:
                if not got:
                    self.stay_stop = STOP_CLOSED
                elif errno != EAGAIN and errno != EINTR:
                    self.error = errno
                    self.stay_stop = STOP_FAILED
                return 0
            now = now_ns()  # perhaps of another clock than the one of the Syncer
            self.end += got
            nr_batches += 1
            if not self._is_one_to_store():
                self.was_batch = self._is_batch()
                self.stay_stop = STOP_RECEIVED
                return 0
            begin_batch(&self.counter, &sampling, now)
            self.stay_stop = self._serve(way)
            if self.stay_stop != STOP_DONE:
                return 0
            if self.nr_syncs:
                self.unsynced_length = 0
                memcpy(answer, SIMPLE_HEAD, 8)
                cookie = htobe64(self.sync_cookies[0])
                memcpy(answer + 8, &cookie, 8)
                memcpy(<uint8_t *>self.arena.buf + self.out, answer, SIMPLE_BYTES)
                return max(now_ns() - now, 1)

    cdef ssize_t _receive_next(self, int64_t began) noexcept nogil:
        """As recv, after waiting for the client, since now. NOTHING_CAME: not for `stay_idle_ns`, or not before the stay has to end."""
        cdef uint8_t *into = <uint8_t *>self.received.buf + self.end
        cdef size_t room = self.received.len - self.end
        cdef int64_t now = began, looked
        cdef int64_t end = min(self.stay_end, began + self.stay_idle_ns)
        cdef ssize_t got
        cdef int ready
        if self.spin_skip:
            self.spin_skip -= 1
        elif self.stay_polls:
            # To fall asleep and to be woken up takes longer than most clients need for their next request.
            while now - began < SPIN_NS:
                sched_yield()
                looked, now = now, now_ns()
                if now - looked > self.late_ns:
                    self.was_late = True
                    self.stay_polls = False
                got = self._receive(into, room)
                if got >= 0 or errno != EAGAIN:
                    self.spin_penalty = 0
                    self.nr_sync_hits += 1
                    if wait_for_either(self.loop_fd, -1, 0):
                        self._note_disturbance()
                    return got
                if self.was_late:
                    break
            self.spin_penalty = min(2 * self.spin_penalty + 1, SPIN_SKIP_MAX)
            self.spin_skip = self.spin_penalty
        ready = wait_for_either(self.sock, self.loop_fd, end - now) if now < end else 0
        if ready & OTHER_READY:
            self._note_disturbance()
        return self._receive(into, room) if ready & FIRST_READY else NOTHING_CAME

    cdef inline void _note_disturbance(self) noexcept nogil:
        """The loop has something else to do. More may follow, in the steps of a task, which nothing tells."""
        self.stay_end = 0
        self.stay_rest = STAY_REST

    cdef bint _is_one_to_store(self) noexcept nogil:
        """Whether one whole request was received, and nothing else, which is a WRITE, or a FLUSH that may be synced for without Python."""
        cdef const uint8_t *at = <const uint8_t *>self.received.buf + self.begin
        cdef Py_ssize_t left = self.end - self.begin - self.request_bytes
        cdef uint16_t command
        if left < 0:
            return False
        memcpy(&command, at + 6, 2)
        command = be16toh(command)
        if command == COMMAND_WRITE:
            return left == <Py_ssize_t>self._length(at)
        # A FLUSH before which something was lost is Python's: it must fail.
        return command == COMMAND_FLUSH and not left and self.lone_sync == LONE_ALL

    cdef Py_ssize_t _pack_read(self, uint8_t *reply, const uint8_t *request, uint32_t length) noexcept nogil:
        """Write the header of a READ's reply, whose data is there. Returns how long the reply is."""
        cdef Py_ssize_t head = self._pack_head(reply, request, length)
        if length >= self.zero_min and is_zero(reply + head, length):
            return turn_into_hole(reply, length)
        return head + <Py_ssize_t>length

    cdef inline void _pack_done(self, uint8_t *reply, const uint8_t *request) noexcept nogil:
        """Write the reply to a WRITE, `done_bytes` long."""
        if self.extended:
            memcpy(reply, EXTENDED_DONE_HEAD, 8)
            memcpy(reply + 8, request + 8, 16)  # the cookie and the offset
            memset(reply + 24, 0, 8)
        else:
            memcpy(reply, SIMPLE_HEAD, 8)
            memcpy(reply + 8, request + 8, 8)

    cdef Py_ssize_t _pack_head(self, uint8_t *reply, const uint8_t *request, uint32_t length) noexcept nogil:
        """Write the header of a READ's reply. Returns how long the header is."""
        cdef uint32_t number
        cdef uint64_t long_number
        memcpy(reply + 8, request + 8, 8)
        if self.extended:
            memcpy(reply, EXTENDED_DATA_HEAD, 8)
            memcpy(reply + 16, request + 16, 8)
            long_number = be64toh(<uint64_t>length + 8)
            memcpy(reply + 24, &long_number, 8)
            memcpy(reply + 32, request + 16, 8)
            return EXTENDED_DATA_BYTES
        if not self.structured:
            memcpy(reply, SIMPLE_HEAD, 8)
            return SIMPLE_BYTES
        memcpy(reply, DATA_HEAD, 8)
        number = htobe32(length + 8)
        memcpy(reply + 16, &number, 4)
        memcpy(reply + 20, request + 16, 8)
        return DATA_BYTES

    # ---- long reads ----

    cdef Mapped _send_mapped(
        self, const Piece *pieces, int nr_pieces, uint8_t *reply, const uint8_t *request, uint32_t length
    ) noexcept nogil:
        """Send all replies, and behind them the one to this READ, whose data the kernel takes from mappings of the files.

        Args: reply: where the arena has room for its reply.
        """
        cdef iovec places[PLACES_MAX]
        cdef int nr, earlier, nr_places = 1
        cdef File *file = pieces[0].file
        cdef Py_ssize_t head = self.data_bytes, before = self.out - self.base
        cdef Py_ssize_t sent
        cdef uint64_t look, done = 0
        cdef int64_t began, taken_ns
        if self.is_stuck or self.records != NULL or file.mapping.table == NULL:
            return MAPPED_NOT
        places[0].iov_base = reply - before
        places[0].iov_len = <size_t>(before + head)
        map_begin(file.mapping.table, length)
        self.has_mapped = True  # also if a window is mapped, and nothing is sent from it
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
            look = ZERO_LOOK if nr == nr_pieces - 1 and length >= self.zero_min else 1
            look = min(look, pieces[nr].length)
            if not read_end(file, reply + head + done - look, pieces[nr].at + pieces[nr].length - look, look):
                return MAPPED_NOT
            if look > 1 and is_zero(reply + head + done - look, look):
                return MAPPED_NOT
            nr_places = map_place(&file.mapping, file.fd, pieces[nr].at, pieces[nr].length, places, nr_places, PLACES_MAX)
            if nr_places < 0:
                return MAPPED_NOT
        time_anyway(&self.counter, 0)  # a page that has gone meanwhile is read from the disk while it is sent
        self._pack_head(reply, request, length)
        began = now_ns()
        sent = self._put(places, nr_places)
        while sent < 0 and errno == EINTR:
            sent = self._put(places, nr_places)
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
            self._all_sent(self.out + head)
            return MAPPED_SENT
        if sent < 0:
            # EFAULT: a page has gone since it was looked at.
            if errno != EAGAIN and errno != EFAULT:
                self.error = errno
                return MAPPED_FAILED
            sent = 0
        return self._read_unsent(pieces, nr_pieces, reply, length, before, sent)

    cdef Mapped _read_unsent(
        self, const Piece *pieces, int nr_pieces, uint8_t *reply, uint32_t length, Py_ssize_t before, Py_ssize_t sent
    ) noexcept nogil:
        """Read into the arena what the socket has not taken of a READ: nothing may wait in a mapping.

        Args: before, sent: bytes in front of its reply, and bytes of all that were sent.
        """
        cdef Py_ssize_t head = self.data_bytes
        cdef uint64_t skip = <uint64_t>max(sent - before - head, 0)
        cdef uint8_t *into = reply + head
        cdef int nr
        for nr in range(nr_pieces):
            if skip >= pieces[nr].length:
                skip -= pieces[nr].length
            else:
                self.error = read_whole(pieces[nr].file, into + skip, pieces[nr].at + skip, pieces[nr].length - skip)
                skip = 0
                if self.error and sent <= before:
                    # Nothing of it has left: Python reads it again, and meets the reason.
                    self.base += sent
                    if self.base == self.out:
                        self._all_sent(self.out)
                    return MAPPED_SLOW
                if self.error:
                    self.is_cut = True
                    self.cut_file = pieces[nr].file
                    return MAPPED_FAILED
            into += pieces[nr].length
        self.base += sent
        self.out += head + <Py_ssize_t>length
        return MAPPED_SENT

    # ---- reads that the page cache could not answer ----

    cdef bint _miss(
        self, Way *way, File *file, const uint8_t *request, uint64_t offset, uint64_t file_at, uint32_t length
    ) noexcept nogil:
        """Put a READ into the ring; `submit` must follow. False: it is for Python."""
        cdef Read *read
        if not ring_takes(file, file_at, length):
            return False
        if self.nr_left < 0:
            with gil:
                self._ask_whether_alone(length)
                if not self.is_alone:
                    self._ask_for_room()
        if not self.nr_left or self.bytes_left < length:
            return False
        if self.uring != file.uring:
            if self.nr_in_ring or self.nr_begun:
                return False
            self.uring = file.uring
        read = begin_read(file.uring, &self.reader, file.fd, file_at, length)
        if read == NULL:
            return False
        self.nr_left -= 1
        self.bytes_left -= length
        read.head_length = self._pack_head(read.head, request, length)
        read.is_hole = False
        read.sent = 0
        read.offset = offset
        time_anyway(&self.counter, 0)
        read.begun_ns = self.counter.received_ns
        read.block = (offset - way.begin) // way.block_size if way.kind == KIND_TABLE else 0
        read.file = file
        read.after = self.begun
        self.begun = read
        self.nr_begun += 1
        file.nr_reads += 1
        return True

    cdef bint _waits_for_it(self) noexcept nogil:
        """Whether to wait for the one READ that was received: going back to the loop takes longer than a fast disk."""
        cdef File *file = <File *>self.begun.file
        if (
            not self.may_wait or not self.is_alone or self.nr_begun != 1 or self.uring.nr_reads != 1 or self.uring.nr_new != 1 or not self.uring.can_wait
            or self.end > self.begin or self.out > self.base
        ):
            return False
        if file.wait_skip:
            file.wait_skip -= 1
            return False
        return True

    cdef void _wait(self) noexcept nogil:
        """Submit the READ, and wait for it; if it ends in time, it is answered like one from the page cache."""
        cdef Read *read = self.begun
        cdef File *file = <File *>read.file
        cdef uint8_t *reply = <uint8_t *>self.arena.buf + self.out
        if not submit_and_wait(self.uring, WAIT_NS):
            file.wait_penalty = min(2 * file.wait_penalty + 1, WAIT_SKIP_MAX)
            file.wait_skip = file.wait_penalty
            return
        file.wait_penalty = 0
        if read.result != <int>read.length:
            return  # `turn` sees to it
        take_ended(self.uring, &self.reader)
        self.begun = NULL
        self.nr_begun = 0
        file.nr_reads = 0
        pack_waited(reply, read, self.zero_min, &self.out)
        self.counter.nr[COMMAND_READ] += 1
        self.counter.nr_bytes[COMMAND_READ] += read.length
        self.nr_left = -1  # nothing is in flight any more
        if self.poison:
            memset(read.data, 0xdb, read.room)
        give_back(read)

    cdef void _ask_whether_alone(self, uint32_t length) noexcept:
        """Find out whether the READ at `begin` is alone. Then it may begin: a connection that has nothing in flight may always
        begin a short request."""
        self.is_alone = False
        if (
            self.may_wait and not self.nr_begun and self.end - self.begin == self.request_bytes
            and self.out == self.base and length <= self.alone_max
        ):
            self.is_alone = self.ring_reads.is_alone()
        if self.is_alone:
            self.nr_left = 1
            self.bytes_left = length

    cdef void _ask_for_room(self) noexcept:
        """Find out how many requests may be in flight after this turn."""
        self.nr_left = 0
        self.nr_left, self.bytes_left = self.ring_reads.room()
        self.nr_left -= self.nr_syncs
        if self.nr_left < 0:
            self.nr_left = 0

    cdef _note_begun(self, Route route):
        """What has begun in this turn is under way while Python code runs: tell all that have to wait for its end."""
        cdef Read *read = self.begun
        cdef int64_t nr = self.nr_begun
        cdef int64_t nr_bytes = 0
        self.begun = NULL
        self.nr_begun = 0
        # Whoever is asked to wait is still there when it ends.
        if not self.nr_in_ring:
            Py_INCREF(self)
        self.nr_in_ring += nr
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
        self.ring_reads.begun(nr, nr_bytes)
        if self.uring.nr_new:
            # The kernel did not take them all.
            route.file._ring.left_over()

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
                self._send_reads(first)
        now = now_ns()
        while read != NULL:
            nr += 1
            if read.result == <int>read.length:
                count_one(&self.counter, COMMAND_READ, read.length, now - read.begun_ns)
            if not self.has_buffers or read.sent == reply_length(read):
                nr_bytes += read.length
            elif read.result != <int>read.length:
                # Python reads it again, and meets the reason.
                nr_bytes += read.length
                again.append((read.head[8:16], read.offset, read.length))
            else:
                self.ring_reads.push(unsent_part(read), read.length)
            read = read.next
        error = self._note_ended(first)
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

    cdef BaseException _note_ended(self, Read *read):
        """Tell all that wait for the end of these reads, and give their memory back. Returns what one of them raised."""
        cdef Read *following
        cdef File *file
        cdef Route route
        cdef int64_t nr
        cdef BaseException error = None
        while read != NULL:
            # Those that follow each other have mostly gone the same way.
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
                if self.poison:
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

    cdef void _send_reads(self, Read *read) noexcept nogil:
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
                    if not read.is_hole and read.length >= self.zero_min and is_zero(read.data, read.length):
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
            sent = self._put(pieces, nr_pieces)
            while sent < 0 and errno == EINTR:
                sent = self._put(pieces, nr_pieces)
            # After an error, too, the replies go into the queue: sending from there meets it again.
            while first != read:
                if first.result == <int>first.length:
                    left = reply_length(first)
                    if sent < <Py_ssize_t>left:
                        first.sent = sent if sent > 0 else 0
                        return
                    first.sent = left
                    sent -= left
                first = first.next


cdef int64_t serve_on(Plane plane, ssize_t nr_sent, char *answer) noexcept nogil:
    return plane._serve_on(nr_sent, answer)
