# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The compiled half of the server's hot path: plain READs and WRITEs, from socket to file and back.

Theory of operation. A `Plane` belongs to one connection. `Plane.turn` receives a batch of requests,
carries out those that are plain, packs their replies and sends them: without a Python object for any of
them, and without the interpreter's lock. A request is *plain* if

    it is a READ or a WRITE, and nothing is wrong with it,
    the `Route` of the device can tell in which file its bytes lie, and where, or in which pieces,
    the file answers at once: a READ from the page cache, a WRITE into it; or io_uring takes the READ.

A WRITE with FUA and a FLUSH need a FLUSH of the whole device in the end. Such a WRITE is written as a plain one, and the cookies of both are
noted. The kernel begins to write such data back at once (`kick`), while the thread that syncs is busy or asleep; so it does with the data of plain WRITEs
of a client that has a FLUSH follow each one or two of them. Python takes them after the turn (`take_syncs`), submits one FLUSH for all of a kind, and answers them when it has ended.

A client that is alone and asks for one durable thing at a time would wait for Python twice, and for two threads that hand over to each other. So
while the route says that a FLUSH of the device is a sync of one file (`Route.may_sync`), and the file has lent its `Syncer`, the sync is made in the turn (`_sync_alone`): the
thread of the Syncer syncs, and answers; the loop waits for it, up to `FastFile.sync_wait_ns`. A sync that fails, or takes longer, is Python's: it
learns of the sync (`sync_left`), and the request goes the usual way.

That is two threads for each request, and each hands over to the other. So the thread goes on in the place of the loop (`_serve_on`), which still stands still: it waits for what the loop would
wait for, the next request of the client and all other events (`loop_fd`), and serves the client alone, until something else comes, or nothing for `stay_idle_ns`, or for `stay_ns`. The loop looks at each of these syncs as at the first
one: if it takes too long, the loop goes on, and the thread touches nothing of the connection any more.

In front of the first request that is not plain, `turn` stops. Python carries that one out and calls `turn`
again. So every rule that is not about plain requests is written once, in Python. And everything but such READs
ends inside `turn`: nothing else is in flight when Python code runs. A suspend, a table swap, a
removal or the end of a connection therefore never has to wait for this module, but for its READs.

READs that the page cache cannot answer go to the ring of the file (`nbdtarget_ring`), one entry for each and one system
call for all of a batch. Each has a buffer of its own, and its reply leaves from there (`Plane.reads_ended`). Before
any other Python code runs, all who must wait for such a READ have been told of it (`_note_begun`):

    the mapped devices on its way   `Route.in_flight`: a suspend, a swap and a removal wait
    its block of a cache            `Route.hold`: the cache block is not used for another one meanwhile
    its file                        `FastFile.note_reads`: the descriptor stays open
    its connection                  `Plane.ring_reads`: it counts against all bounds, and the connection is not released

So it does not matter if the route is closed meanwhile. A READ that fails or comes short is Python's.

A long READ is not copied into the arena: the kernel sends it from a mapping of the file (`nbdtarget_map`), at once and within one system call (`_send_mapped`). What
the socket does not take is read into the arena before anything else happens. So nothing that waits to be sent refers to a mapping, and a suspend, a swap or
a later WRITE meets the same as after any other READ. A WRITE of another client at the same time may show in a part of the reply, as it may with pread.

A client that asks for one READ at a time waits for two wake-ups: when the disk has answered, and when its next request
has come. Both cost more than the READ of a fast disk. So while a connection is the only one that has something to do, and
sends one request at a time, a READ that is alone is waited for, up to WAIT_NS. That holds the loop up as polling does,
and no longer than a turn lasts (`turn_ns`), but the processor is free meanwhile. A slow disk is soon not waited for any more (`_wait`).

    Python   receive buffer   [begin, end): received and not yet served
             arena            [base, out): replies that are packed and not yet sent

`turn` uses the two buffers and the four numbers, and Python reads the numbers afterwards. Neither
looks at them while the other one runs.

With TLS `nbdtarget_tls` stands between the socket and the two buffers. It may have received more than the receive buffer takes, and the
loop does not know of that: so a turn does not end with DONE before all of it is served.

The loop calls the `Receiver` of a connection, which runs one turn. It calls Python code only for what is not plain.

Who says what may be done. A device gives its `Route` only while its requests may take this way, and closes it
then; it is looked at before each turn. `FastFile` and `Route` have fields that their owners set at any time between two
turns (`write_max`, `can_write`, ...), and they point to tables that their owners change in place: the bitmap
of a clone, the hash table of a cache policy. All of these change in the thread of the event loop only, and
that is the thread which is here.

Memory safety. Every number that comes from a client or from a table is compared with the length of what it
points into, before it is used.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, errno
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

from nbdtarget_map cimport Mapping, Windows, map_begin, map_place, map_sent, map_skips
from nbdtarget_ring cimport (
    Read,
    Reader,
    Ring,
    Uring,
    begin_read,
    give_back,
    submit,
    submit_and_wait,
    take_ended,
)
from nbdtarget_sync cimport Syncer, sync_begin, sync_end, sync_job, sync_next
from nbdtarget_tls cimport Records, TlsRecords, iovec, tls_has_pending, tls_receive, tls_send

from nbdtarget_map import new_owner

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from *:
    """
    #include <poll.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <sys/uio.h>
    #include <time.h>
    #include <unistd.h>

    /* In a process with threads, the functions of the C library cost two atomic operations more for each call, because a thread could be
       cancelled in them. AddressSanitizer sees what they write to memory, and nothing of what a system call does. */
    #if defined(__LP64__) && !defined(__SANITIZE_ADDRESS__)
    static inline ssize_t file_preadv2(int fd, const struct iovec *places, int count, off_t offset, int flags) {
        return syscall(SYS_preadv2, (long)fd, places, (long)count, offset, 0L, (long)flags);
    }
    static inline ssize_t file_pwrite(int fd, const void *data, size_t length, off_t offset) {
        return syscall(SYS_pwrite64, (long)fd, data, length, offset);
    }
    static inline ssize_t socket_recv(int fd, void *data, size_t length, int flags) {
        return syscall(SYS_recvfrom, (long)fd, data, length, (long)flags, NULL, NULL);
    }
    static inline ssize_t socket_send(int fd, const void *data, size_t length, int flags) {
        return syscall(SYS_sendto, (long)fd, data, length, (long)flags, NULL, 0L);
    }
    #else
    #define file_preadv2 preadv2
    #define file_pwrite pwrite
    #define socket_recv recv
    #define socket_send send
    #endif

    enum { FIRST_READY = 1, OTHER_READY = 2 };

    /* Wait until one of them is readable. Returns which are; 0: neither. */
    static inline int wait_for_either(int fd, int other_fd, int64_t wait_ns) {
        struct pollfd places[2] = {{.fd = fd, .events = POLLIN}, {.fd = other_fd, .events = POLLIN}};
        const struct timespec time = {wait_ns / 1000000000, wait_ns % 1000000000};
        if (ppoll(places, 2, &time, NULL) <= 0)
            return 0;
        return (places[0].revents ? FIRST_READY : 0) | (places[1].revents ? OTHER_READY : 0);
    }
    """
    ssize_t file_preadv2(int fd, const iovec *places, int count, off_t offset, int flags) nogil
    ssize_t file_pwrite(int fd, const void *data, size_t length, off_t offset) nogil
    ssize_t socket_recv(int fd, void *data, size_t length, int flags) nogil
    ssize_t socket_send(int fd, const void *data, size_t length, int flags) nogil
    enum:
        FIRST_READY
        OTHER_READY
    int wait_for_either(int fd, int other_fd, int64_t wait_ns) nogil

cdef extern from "<sys/socket.h>" nogil:
    int MSG_DONTWAIT
    int MSG_NOSIGNAL
    struct msghdr:
        iovec *msg_iov
        size_t msg_iovlen
    ssize_t sendmsg(int fd, const msghdr *message, int flags)

cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint64_t htobe64(uint64_t value)
    uint32_t htobe32(uint32_t value)

cdef extern from "nbdtarget_clock.h" nogil:
    struct Moment "nbdtarget_moment":
        uint64_t ticks
        int64_t ns
        int64_t slept_ns
    struct Rate "nbdtarget_rate":
        Moment since
    const bint HAS_TICKS "NBDTARGET_HAS_TICKS"
    int64_t now_ns "nbdtarget_now_ns"()
    int64_t ns_at "nbdtarget_ns_at"(const Rate *rate, uint64_t ticks)
    Moment moment_now "nbdtarget_moment_now"()
    bint rate_of "nbdtarget_rate_of"(Moment first, Moment last, Rate *rate)
    void use_rate "nbdtarget_use_rate"(const Rate *rate)

cdef extern from "nbdtarget_counting.h" nogil:
    int NR_BOUNDS "NBDTARGET_NR_BOUNDS"
    int NR_COUNTED "NBDTARGET_NR_COUNTED"
    int COUNTED_FLUSH "NBDTARGET_COUNTED_FLUSH"
    const int64_t *bounds_ns "nbdtarget_bounds_ns"
    struct Sampling "nbdtarget_sampling":
        uint32_t nr_untimed
        uint32_t nr_exact
        int64_t since_ns
    struct Times "nbdtarget_times":
        uint64_t taken_ns
        uint64_t *buckets
        int64_t usual_ns
        int usual_bucket
    struct Counter "nbdtarget_counter":
        int64_t received_ns
        uint64_t *nr
        uint64_t *nr_bytes
        uint8_t knows_usual
        Times *times
    void time_passed "nbdtarget_time_passed"(Sampling *sampling, int64_t now)
    bint is_chosen "nbdtarget_is_chosen"(Sampling *sampling)
    void was_chosen "nbdtarget_was_chosen"(Sampling *sampling, int64_t now)
    int bucket_of "nbdtarget_bucket"(int64_t taken_ns)
    void count_one "nbdtarget_count_one"(Counter *counter, int op, uint64_t nr_bytes, int64_t taken_ns)
    void begin_batch "nbdtarget_begin_batch"(Counter *counter, Sampling *sampling, int64_t since)
    void time_anyway "nbdtarget_time_anyway"(Counter *counter, int64_t since)
    void add_untimed "nbdtarget_add_untimed"(Counter *counter, const uint64_t *nr)
    int64_t end_batch "nbdtarget_end_batch"(Counter *counter, Sampling *sampling)

cdef extern from "<fcntl.h>" nogil:
    int sync_file_range(int fd, off_t offset, off_t length, unsigned flags)
    unsigned SYNC_FILE_RANGE_WRITE

cdef extern from "<sched.h>" nogil:
    int sched_yield()

__all__ = [
    "BOUNDS_NS", "WRITE_PIECE_BYTES",
    "ABI", "BLOCKED", "CLOSED", "DONE", "FAILED", "POLLED", "SLOW", "TURN_OVER", "UNFINISHED",
    "FastFile", "Plane", "Receiver", "Route", "write_pieces",
]

ABI = 14  # of `nbdtarget.fast.compiled`

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
    REQUEST_BYTES = 28
    DATA_BYTES = 28  # the header of an OFFSET_DATA chunk
    SIMPLE_BYTES = 16
    HOLE_BYTES = 32  # an OFFSET_HOLE chunk
    # The same with extended headers. A WRITE is answered with a NONE chunk.
    EXTENDED_REQUEST_BYTES = 32
    EXTENDED_DATA_BYTES = 40
    EXTENDED_DONE_BYTES = 32
    EXTENDED_HOLE_BYTES = 44
    COMMAND_READ = 0
    COMMAND_WRITE = 1
    COMMAND_FLUSH = 3
    FLAG_FUA = 1
    FLAG_PAYLOAD_LEN = 32  # of a WRITE with extended headers: says only that it has a payload
    SYNCS_MAX = 256  # requests whose replies wait for one FLUSH of the device

    # Between two looks at the clock. Each request counts as so many bytes more than it has.
    LOOK_BYTES = 262144
    REQUEST_WEIGHT = 4096

    POLL_GAP_NS = 20000  # between two looks at the socket: others want the processor
    WRITE_PIECE = 65536  # see `nbdtarget.devices.file.pieces`
    LARGE = 32768  # what is left of a WRITE that is received apart
    BEHIND_LARGE = 4096  # so much is received behind it
    LOCKED_MAX = 64  # blocks; while more are locked, nothing takes this way
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
    # Beginning to write back may take long, where the kernel throttles. Each time that it does, twice as many WRITEs go without.
    KICK_SLOW_NS = 250000
    KICK_SKIP_MAX = 1024
    WAIT_SKIP_MAX = 64
    GATHER_PIECES = 128  # of one sendmsg: two for each reply
    NOTED_MAX = 64  # first hits of one turn
    SLOW_WRITE_NS = 250000  # the time of a WRITE that takes longer is counted in any case
    MIXED_MAX = 64  # regions or blocks of one request that are looked at one by one
    PLACES_MAX = 80  # of one reply in windows: its pieces, and where one of them leaves a window
    ZERO_LOOK = 4096  # so much of the end of a READ tells in most cases that it is no hole

    KIND_FLAT = 0
    KIND_BITMAP = 1
    KIND_TABLE = 2

WRITE_PIECE_BYTES = WRITE_PIECE  # for the test that it is the same as in Python

BOUNDS_NS = tuple(bounds_ns[nr] for nr in range(NR_BOUNDS))

cdef uint32_t NO_ENTRY = 0xFFFFFFFFU
cdef uint64_t HASH_MULTIPLIER = 0x9E3779B1ULL
cdef uint64_t HASH_MASK = 0xFFFFFFFFULL

# The first eight bytes, as they go over the wire; the cookie follows.
cdef const char *REQUEST_HEAD = b"\x25\x60\x95\x13"
cdef const char *DATA_HEAD = b"\x66\x8e\x33\xef\x00\x01\x00\x01"  # structured, DONE, OFFSET_DATA
cdef const char *HOLE_HEAD = b"\x66\x8e\x33\xef\x00\x01\x00\x02"  # structured, DONE, OFFSET_HOLE
cdef const char *SIMPLE_HEAD = b"\x67\x44\x66\x98\x00\x00\x00\x00"  # no error
cdef const char *EXTENDED_REQUEST_HEAD = b"\x21\xe4\x1c\x71"
cdef const char *EXTENDED_DATA_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x01"  # DONE, OFFSET_DATA
cdef const char *EXTENDED_HOLE_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x02"  # DONE, OFFSET_HOLE
cdef const char *EXTENDED_DONE_HEAD = b"\x6e\x8a\x27\x8c\x00\x01\x00\x00"  # DONE, NONE


# ---- files ----

cdef enum Found:
    FOUND
    MISSED
    REFUSED

cdef struct File:
    int fd
    int read_flags
    uint64_t size
    uint64_t read_max
    uint64_t write_max
    int64_t slow_ns
    bint was_slow
    Uring *uring  # NULL: what the page cache does not have is for Python
    uint64_t ring_max
    uint64_t align_mask  # of what the ring reads
    Mapping mapping  # where long READs are sent from
    int64_t nr_reads  # that were begun in this turn, and not yet told of
    unsigned wait_skip  # so many READs are not waited for
    unsigned wait_penalty
    uint32_t fake_misses  # for tests
    uint32_t fake_state
    int fake_error  # for tests
    int64_t fake_send_ns  # for tests
    sync_job *job  # NULL: syncs are Python's
    bint is_left  # a sync has begun, and is Python's to end
    bint kicks
    int kick_error
    int64_t sync_wait_ns
    uint64_t nr_synced
    unsigned kick_skip  # so many WRITEs are not kicked
    unsigned kick_penalty


cdef int64_t nr_batches = 0  # that all Planes have received; the loop's thread counts, or the thread of a Syncer while that one stands still


def batches_received():
    """Return how many times the Planes of this process have received something: a number that only grows."""
    return nr_batches


# ---- time ----

CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"

cdef Moment imported = moment_now()
cdef Rate found_rate
cdef bint is_rate_found = False
cdef Rate skewed_rate


def choose_clock(clocksource=CLOCKSOURCE):
    """Take the time from the processor's counter from now on, if the kernel does; it may change its mind. See `nbdtarget_clock.h`.

    Args: clocksource: the file that tells.
    Returns: whether it is the counter.
    """
    global is_rate_found
    name = ""
    if HAS_TICKS:
        try:
            with open(clocksource) as file:
                name = file.read().strip()
        except OSError:
            pass  # in some containers: then it is the clock
    if name == "tsc" and not is_rate_found:
        is_rate_found = rate_of(imported, moment_now(), &found_rate)
    use_rate(&found_rate if name == "tsc" and is_rate_found else NULL)
    return name == "tsc" and is_rate_found


def clock_ns():
    """For tests: the time, as requests are measured with it."""
    return now_ns()


def skew_clock(int64_t ahead_ns):
    """For tests: let the processor's counter tell the time, and be so far ahead of the clock, until `choose_clock` is called.

    Returns: whether there is such a counter, whose rate is known.
    """
    if not HAS_TICKS or not rate_of(imported, moment_now(), &skewed_rate):
        return False
    skewed_rate.since.ns += ahead_ns
    use_rate(&skewed_rate)
    return True


def ns_of_ticks(first, last, uint64_t ticks):
    """For tests: what the clock shows at `ticks`, if at two moments (ticks, ns, ns that the machine has slept) both were looked at; None:
    nothing can be said."""
    cdef Moment one, other
    cdef Rate rate
    one.ticks, one.ns, one.slept_ns = first
    other.ticks, other.ns, other.slept_ns = last
    return ns_at(&rate, ticks) if rate_of(one, other, &rate) else None


cdef inline bint lies_in(uint64_t offset, uint64_t length, uint64_t size) noexcept nogil:
    return length <= size and offset <= size - length


cdef inline bint read_end(File *file, uint8_t *into, uint64_t at, uint64_t length) noexcept nogil:
    """Read this last part of a READ; whether it was all there at once. The file may be shorter than it was."""
    cdef iovec place
    place.iov_base = into
    place.iov_len = length
    return file_preadv2(file.fd, &place, 1, <off_t>at, file.read_flags) == <ssize_t>length


cdef int read_whole(const File *file, uint8_t *into, uint64_t at, uint64_t length) noexcept nogil:
    """Read from the page cache, or else from the disk. Returns 0 or an errno."""
    cdef iovec place
    cdef ssize_t got
    if file.fake_error:
        return file.fake_error
    while length:
        place.iov_base = into
        place.iov_len = length
        got = file_preadv2(file.fd, &place, 1, <off_t>at, 0)
        if got > 0:
            into += got
            at += <uint64_t>got
            length -= <uint64_t>got
        elif not got:
            return EIO  # the file has been truncated
        elif errno != EINTR:
            return errno
    return 0


cdef inline Found file_read(File *file, uint8_t *into, uint64_t offset, uint64_t length) noexcept nogil:
    """FOUND: all of it was there at once. MISSED: the page cache has not all of it."""
    cdef iovec place
    cdef ssize_t got
    if not lies_in(offset, length, file.size):
        return REFUSED
    if length > file.read_max or file.fake_misses and is_fake_miss(file):
        return MISSED
    place.iov_base = into
    place.iov_len = length
    got = file_preadv2(file.fd, &place, 1, <off_t>offset, file.read_flags)
    if got == <ssize_t>length:
        return FOUND
    return MISSED if got >= 0 or errno == EAGAIN else REFUSED


cdef bint is_fake_miss(File *file) noexcept nogil:
    """For tests: so many of 2^32 reads are taken for misses."""
    file.fake_state = file.fake_state * 1664525 + 1013904223
    return file.fake_state < file.fake_misses


cdef inline bint ring_takes(const File *file, uint64_t offset, uint64_t length) noexcept nogil:
    return file.uring != NULL and length <= file.ring_max and not (offset | length) & file.align_mask


cdef inline bint file_takes(const File *file, uint64_t offset, uint64_t length) noexcept nogil:
    return length <= file.write_max and lies_in(offset, length, file.size)


cdef inline uint64_t file_write(
    File *file, const uint8_t *data, uint64_t offset, uint64_t length, int *error, int64_t *slow_since
) noexcept nogil:
    """Return how much the page cache took; if that is not all, `error` may say why. If it took long, `slow_since` says since when."""
    cdef uint64_t put = 0
    cdef uint64_t step
    cdef ssize_t taken
    cdef int64_t began = now_ns(), taken_ns
    error[0] = 0
    while put < length:
        step = length - put
        if step > WRITE_PIECE:
            step = WRITE_PIECE
        taken = file_pwrite(file.fd, data + put, step, <off_t>(offset + put))
        if taken < 0:
            if errno == EINTR:
                continue
            error[0] = errno
            return put
        put += <uint64_t>taken
        if <uint64_t>taken < step:
            break
    taken_ns = now_ns() - began
    if taken_ns > min(file.slow_ns, SLOW_WRITE_NS):
        slow_since[0] = began
    if taken_ns > file.slow_ns:
        # The next write is the device's to decide about.
        file.was_slow = True
        file.write_max = 0
    return put


cdef int64_t kick(File *file, uint64_t at, uint64_t length) noexcept nogil:
    """Have the kernel begin to write back what a sync is about to wait for. Returns since when, if that took too long; 0: it did not."""
    cdef int64_t began
    cdef int error
    if file.kick_skip:
        file.kick_skip -= 1
        return 0
    began = now_ns()
    error = errno if sync_file_range(file.fd, <off_t>at, <off_t>length, SYNC_FILE_RANGE_WRITE) else 0
    if error:
        # Perhaps it is told only here: Python decides what that means.
        file.kick_error = error
        file.kick_skip = <unsigned>-1
    elif now_ns() - began > KICK_SLOW_NS:
        file.kick_penalty = min(2 * file.kick_penalty + 1, KICK_SKIP_MAX)
        file.kick_skip = file.kick_penalty
        return began
    return 0


def write_pieces(int fd, payload, Py_ssize_t put, uint64_t offset, Py_ssize_t piece):
    """Write what is left of `payload`, of which `put` bytes are written, in calls of at most `piece` bytes.

    A worker's: Python's lock is given back once for all of them, and not for each.

    Args: offset: of the whole payload in the file.
    Returns: how much of it is written, and the errno if that is not all: 0 if the file took nothing.
    """
    cdef Py_buffer view
    cdef ssize_t taken
    cdef int error = 0
    PyObject_GetBuffer(payload, &view, PyBUF_SIMPLE)
    try:
        with nogil:
            while put < view.len:
                taken = file_pwrite(
                    fd,
                    <const uint8_t *>view.buf + put,
                    <size_t>min(view.len - put, piece),
                    <off_t>(offset + <uint64_t>put),
                )
                if taken > 0:
                    put += taken
                elif taken == 0:
                    break
                elif errno != EINTR:
                    error = errno
                    break
    finally:
        PyBuffer_Release(&view)
    return put, error


cdef class FastFile:
    """An open file, and what may be done with it without asking its device.

    The device keeps the fields up to date, and closes the file only when no `Route` leads here.

    Args:
        fd: stays the device's.
        slow_ns: a WRITE that takes longer is the last one until `was_slow` has been called.
        was_slow: the device's: it decides whether `write_max` stays 0.
        was_unfinished: the device's: a WRITE that it gets soon has been begun here. Takes the offset and length, the bytes that the page
            cache took, the errno, 0: none, and how many other WRITEs the device gets before it.
        note_reads: the device's: so many reads more are in the ring now; fewer, if it is negative. While
            there are some, the device keeps the file open.
        sync_left: the device's: the Syncer has begun a sync here, and it has failed, or takes long. Its end is the device's to take.
        kick_failed: the device's: the kernel could not begin to write back, for the reason of this errno. None: that is left to the syncs.
        read_failed: the device's: a READ has failed here, for the reason of this errno, when a part of its reply had left.

    Attributes:
        windows: where long READs are sent from; None: all are copied. Whoever takes them away, or closes the file, calls `Windows.drop`.
        owner: the number of the file in `windows`.
        ring: where READs go that the page cache cannot answer; None: to Python.
        ring_max: up to which length they do.
        align: what their offsets and lengths are multiples of; a power of two.
        fake_misses: for tests: so many of 2^32 READs are taken for misses.
        fake_error: for tests: the errno of reading what is left of a READ from a window; 0: it succeeds.
        fake_send_ns: for tests: how long a send from windows is said to have taken; 0: it is measured.
        size: bytes.
        read_max: up to which length READs are tried, 0: not at all.
        read_flags: of preadv2.
        write_max: up to which length WRITEs are done here, 0: not at all.
        syncer: syncs the file, while it is idle and the device says that it may be used here; or None.
        sync_wait_ns: how long the loop waits for its end.
        nr_synced: how often it has succeeded here.
    """

    cdef File file
    cdef object sync_left
    cdef object kick_failed
    cdef object read_failed
    cdef Windows _windows
    cdef Syncer _syncer
    cdef object was_slow
    cdef object was_unfinished
    cdef object note_reads
    cdef Ring _ring

    def __init__(self, int fd, int64_t slow_ns, was_slow, was_unfinished, note_reads=None, sync_left=None, kick_failed=None, read_failed=None):
        self.sync_left, self.kick_failed, self.read_failed = sync_left, kick_failed, read_failed
        self.file.mapping.owner = <uint64_t>new_owner()
        self.file.mapping.length_min = <uint64_t>-1
        self.file.kicks = kick_failed is not None
        self.note_reads = note_reads
        self.file.fd = fd
        self.file.slow_ns = slow_ns
        self.was_slow = was_slow
        self.was_unfinished = was_unfinished

    @property
    def syncer(self):
        return self._syncer

    @syncer.setter
    def syncer(self, Syncer value):
        if value is not None and (not value.is_started or self.sync_left is None or self.kick_failed is None):
            raise ValueError("no callback was given for what is left of a sync, or the sync has no thread yet")
        self._syncer = value
        self.file.job = NULL if value is None else value.job

    @property
    def sync_wait_ns(self):
        return self.file.sync_wait_ns

    @sync_wait_ns.setter
    def sync_wait_ns(self, int64_t value):
        self.file.sync_wait_ns = max(value, 0)

    @property
    def nr_synced(self):
        return self.file.nr_synced

    @property
    def windows(self):
        return self._windows

    @windows.setter
    def windows(self, Windows value):
        self._windows = value
        if value is None or not value.table.nr_sets:
            self.file.mapping.table = NULL
            self.file.mapping.length_min = <uint64_t>-1
        else:
            self.file.mapping.table = &value.table
            self.file.mapping.length_min = value._length_min

    @property
    def owner(self):
        return self.file.mapping.owner

    @property
    def size(self):
        return self.file.size

    @size.setter
    def size(self, uint64_t value):
        self.file.size = value

    @property
    def read_max(self):
        return self.file.read_max

    @read_max.setter
    def read_max(self, uint64_t value):
        self.file.read_max = value

    @property
    def read_flags(self):
        return self.file.read_flags

    @read_flags.setter
    def read_flags(self, int value):
        self.file.read_flags = value

    @property
    def ring(self):
        return self._ring

    @ring.setter
    def ring(self, Ring value):
        if self.file.nr_reads:
            raise ValueError("reads are being begun")
        self._ring = value
        self.file.uring = NULL if value is None else &value.uring

    @property
    def ring_max(self):
        return self.file.ring_max

    @ring_max.setter
    def ring_max(self, uint64_t value):
        self.file.ring_max = value

    @property
    def align(self):
        return self.file.align_mask + 1

    @align.setter
    def align(self, uint64_t value):
        if not value or value & (value - 1):
            raise ValueError("not a power of two")
        self.file.align_mask = value - 1

    @property
    def fake_misses(self):
        return self.file.fake_misses

    @fake_misses.setter
    def fake_misses(self, uint32_t value):
        self.file.fake_misses = value

    @property
    def fake_error(self):
        return self.file.fake_error

    @fake_error.setter
    def fake_error(self, int value):
        self.file.fake_error = value

    @property
    def fake_send_ns(self):
        return self.file.fake_send_ns

    @fake_send_ns.setter
    def fake_send_ns(self, int64_t value):
        self.file.fake_send_ns = value

    @property
    def write_max(self):
        return self.file.write_max

    @write_max.setter
    def write_max(self, uint64_t value):
        self.file.write_max = value


# ---- routes ----

cdef struct Way:
    bint is_open  # until the route is closed
    int kind
    bint can_read
    bint can_write
    bint is_read_only
    uint64_t begin  # the route is for the bytes [begin, size) of the device
    uint64_t size
    File *file
    int64_t delta  # in a flat route, to the file's offsets
    # A bitmap: set bits are in `file`, others in `other`.
    const uint8_t *bits
    uint64_t nr_bits
    int shift
    File *other
    bint can_read_other
    # A table: see `nbdtarget.policies.smq.block_table`.
    uint64_t block_size
    uint64_t nr_blocks
    const uint64_t *blocks
    const uint32_t *buckets
    const uint32_t *chain
    uint64_t nr_entries
    uint64_t nr_buckets
    int bucket_shift
    const uint8_t *is_hit
    const uint8_t *dirty
    const uint8_t *discarded
    uint64_t nr_discard_bits
    int discard_shift
    uint64_t locked[64]  # LOCKED_MAX
    int nr_locked
    bint notes_hits
    uint64_t noted[64]  # NOTED_MAX
    int nr_noted
    # In this turn.
    uint64_t nr_reads
    uint64_t nr_writes


cdef inline bint is_set(const uint8_t *bits, uint64_t nr) noexcept nogil:
    return (bits[nr >> 3] >> (nr & 7)) & 1


cdef File *find_by_bitmap(
    const Way *way, uint64_t offset, uint64_t length, bint is_write, uint64_t *at
) noexcept nogil:
    cdef uint64_t first = offset >> way.shift
    cdef uint64_t last = (offset + length - 1) >> way.shift
    cdef uint64_t nr
    cdef bint here
    if last >= way.nr_bits or last - first > MIXED_MAX:
        return NULL
    here = is_set(way.bits, first)
    for nr in range(first + 1, last + 1):
        if is_set(way.bits, nr) != here:
            return NULL
    at[0] = offset
    if here:
        return way.file
    return way.other if not is_write and way.can_read_other else NULL


cdef File *find_by_table(
    Way *way, uint64_t offset, uint64_t length, bint is_write, uint64_t *at
) noexcept nogil:
    cdef uint64_t block = offset // way.block_size
    cdef uint64_t inside = offset - block * way.block_size
    cdef uint64_t bucket = ((block * HASH_MULTIPLIER) & HASH_MASK) >> way.bucket_shift
    cdef uint64_t steps = 0
    cdef uint32_t entry
    cdef int nr
    if inside + length > way.block_size or block >= way.nr_blocks:
        return NULL
    if bucket >= way.nr_buckets:
        return NULL
    for nr in range(way.nr_locked):
        if way.locked[nr] == block:
            return NULL
    entry = way.buckets[bucket]
    while entry != NO_ENTRY:
        if entry >= way.nr_entries or steps > way.nr_entries:
            return NULL
        if way.blocks[entry] == block:
            break
        entry = way.chain[entry]
        steps += 1
    else:
        return NULL  # not cached
    if not way.is_hit[entry]:
        # The first hit of this period: the policy wants to know, and is told after the turn.
        if is_write or not way.notes_hits or way.nr_noted == NOTED_MAX:
            return NULL
        way.noted[way.nr_noted] = block
        way.nr_noted += 1
    if is_write:
        if not is_set(way.dirty, entry):
            return NULL
        if (block >> way.discard_shift) >= way.nr_discard_bits or is_set(way.discarded, block >> way.discard_shift):
            return NULL
    at[0] = <uint64_t>entry * way.block_size + inside
    return way.file


cdef inline File *find(
    Way *way, uint64_t offset, uint64_t length, bint is_write, uint64_t *at
) noexcept nogil:
    """Return the file that has these bytes, and where in `at`; NULL: ask Python.

    The caller has seen to it that they lie in the device.
    """
    if offset < way.begin:
        return NULL
    if is_write:
        if way.is_read_only or not way.can_write:
            return NULL
    elif not way.can_read:
        return NULL
    if way.kind == KIND_FLAT:
        at[0] = offset + <uint64_t>way.delta
        return way.file
    if way.kind == KIND_BITMAP:
        return find_by_bitmap(way, offset - way.begin, length, is_write, at)
    return find_by_table(way, offset - way.begin, length, is_write, at)


cdef struct Piece:
    # A part of a request that lies in one place.
    File *file
    uint64_t at  # in the file
    uint64_t length


cdef int find_pieces(
    Way *way, uint64_t offset, uint64_t length, bint is_write, Piece *pieces
) noexcept nogil:
    """Cut a request at the borders of regions or blocks: up to MIXED_MAX pieces, each of one of them. Returns how many there are; 0: ask Python."""
    cdef uint64_t size = way.block_size if way.kind == KIND_TABLE else <uint64_t>1 << way.shift
    cdef uint64_t step
    cdef int nr = 0
    if way.kind == KIND_FLAT or offset < way.begin:
        return 0
    while length:
        if nr == MIXED_MAX:
            return 0
        step = min(size - (offset - way.begin) % size, length)
        pieces[nr].file = find(way, offset, step, is_write, &pieces[nr].at)
        if pieces[nr].file == NULL:
            return 0
        pieces[nr].length = step
        offset += step
        length -= step
        nr += 1
    return nr


cdef int join_pieces(Piece *pieces, int nr_pieces) noexcept nogil:
    """Make one piece of those that follow each other in a file. Returns how many there are then."""
    cdef int nr, nr_joined = 0
    cdef Piece *last
    for nr in range(nr_pieces):
        last = &pieces[nr_joined - 1]
        if nr_joined and last.file == pieces[nr].file and last.at + last.length == pieces[nr].at:
            last.length += pieces[nr].length
        else:
            pieces[nr_joined] = pieces[nr]
            nr_joined += 1
    return nr_joined


cdef Found read_pieces(const Piece *pieces, int nr_pieces, uint8_t *into, uint64_t length) noexcept nogil:
    """Read what lies in several places. FOUND: all of it was there at once; otherwise ask Python."""
    cdef int nr
    if not nr_pieces:
        return REFUSED
    for nr in range(nr_pieces):
        if length > pieces[nr].file.read_max or file_read(pieces[nr].file, into, pieces[nr].at, pieces[nr].length) != FOUND:
            return REFUSED
        into += pieces[nr].length
    return FOUND


cdef class _Memory:
    """The memory of a buffer, and what keeps it."""

    cdef Py_buffer view
    cdef bint is_held

    def __cinit__(self, owner):
        PyObject_GetBuffer(owner, &self.view, PyBUF_SIMPLE)
        self.is_held = True

    def __dealloc__(self):
        if self.is_held:
            PyBuffer_Release(&self.view)


cdef class Route:
    """Where the bytes of a device lie, of a device whose table is one target.

    Made by `flat`, `by_bitmap` or `by_table`.

    Attributes:
        can_read, can_write: whether READs, WRITEs may take this way now. Set by the target.
        is_read_only: of the mapped device, which says it.
        can_read_other: whether what lies in the other file of a bitmap may be read there.
        locked: in a table, the blocks that are locked; a negative number stands for more than one block, and
            then no request takes this way.
        may_sync: is asked before a turn whether a FLUSH of the device is now a sync of `file`, and nothing else; None: it never is.
        was_served: is called after a turn with the numbers of READs and WRITEs that it served; or None.
        in_flight: of the mapped devices on the way; each is told how many reads have begun to be in the ring
            (`begin_reads`), and how many have ended (`end_reads`).
        note_hit: in a table, is called after a turn with each block that was read there and whose entry in `is_hit` is 0; None: READs of
            such blocks are for Python.
        hold, let_go: in a table, are called with the block of each read that is in the ring, when that has begun and when it
            has ended.
    """

    cdef Way way
    cdef FastFile file
    cdef FastFile other
    cdef list memory
    cdef public dict locked  # the numbers are the keys
    cdef public object may_sync
    cdef public object was_served
    cdef public tuple in_flight
    cdef object _note_hit
    cdef public object hold
    cdef public object let_go

    def __init__(self, FastFile file not None, uint64_t begin, uint64_t size):
        self.file = file
        self.in_flight = ()
        self.memory = []
        self.way.is_open = True
        self.way.file = &file.file
        self.way.begin = begin
        self.way.size = size

    @property
    def can_read(self):
        return self.way.can_read

    @can_read.setter
    def can_read(self, bint value):
        self.way.can_read = value

    @property
    def can_write(self):
        return self.way.can_write

    @can_write.setter
    def can_write(self, bint value):
        self.way.can_write = value

    @property
    def can_read_other(self):
        return self.way.can_read_other

    @can_read_other.setter
    def can_read_other(self, bint value):
        self.way.can_read_other = value

    cdef bint note_locked(self) except -1:
        """Whether any request may take this way; if so, which blocks are locked is at hand."""
        cdef int64_t number
        self.way.nr_locked = 0
        if not self.locked:
            return True
        if len(self.locked) > LOCKED_MAX:
            return False
        for key in self.locked:
            number = key
            if number < 0:
                return False
            self.way.locked[self.way.nr_locked] = <uint64_t>number
            self.way.nr_locked += 1
        return True

    @property
    def is_read_only(self):
        return self.way.is_read_only

    @is_read_only.setter
    def is_read_only(self, bint value):
        self.way.is_read_only = value

    @property
    def note_hit(self):
        return self._note_hit

    @note_hit.setter
    def note_hit(self, value):
        self._note_hit = value
        self.way.notes_hits = value is not None

    cdef tell_hits(self):
        cdef int nr, nr_noted = self.way.nr_noted
        self.way.nr_noted = 0
        for nr in range(nr_noted):
            self._note_hit(self.way.noted[nr])

    cdef tell_windows(self):
        """Windows were used: those that were mapped just now are to be swept some day."""
        cdef FastFile file
        for file in (self.file, self.other):
            if file is not None and file._windows is not None and file._windows.table.is_sweep_wanted:
                file._windows.table.is_sweep_wanted = False
                file._windows.sweep_wanted()

    cdef FastFile file_of(self, const File *file):
        return self.file if file == &self.file.file else self.other

    cdef _Memory borrow(self, owner):
        cdef _Memory memory = _Memory(owner)
        self.memory.append(memory)
        return memory

    @staticmethod
    def flat(FastFile file not None, int64_t delta, uint64_t size):
        """The byte x of the device lies at x + delta of the file."""
        cdef Route route = Route(file, 0, size)
        route.way.kind = KIND_FLAT
        route.way.delta = delta
        return route

    @staticmethod
    def by_bitmap(FastFile file not None, FastFile other, bits, uint64_t nr_bits, int shift, uint64_t begin, uint64_t size):
        """Regions of 2^shift bytes: those whose bit is set lie in `file`, the others can be read from `other`.

        Args:
            other: None: Python reads them.
            bits: a little-endian bitmap.
            begin: byte x of the files is byte begin + x of the device.
        """
        cdef Route route = Route(file, begin, size)
        cdef _Memory memory = route.borrow(bits)
        if not 0 < shift < 63 or <uint64_t>memory.view.len * 8 < nr_bits:
            raise ValueError("the bitmap is too short")
        route.way.kind = KIND_BITMAP
        route.way.bits = <const uint8_t *>memory.view.buf
        route.way.nr_bits = nr_bits
        route.way.shift = shift
        if other is not None:
            route.other = other
            route.way.other = &other.file
            route.way.can_read_other = True
        return route

    @staticmethod
    def by_table(FastFile file not None, blocks, buckets, chain, int bucket_shift, is_hit, dirty, discarded,
                 uint64_t nr_discard_bits, int discard_shift, uint64_t block_size, uint64_t nr_blocks, uint64_t begin, uint64_t size):
        """Blocks that a hash table finds in the file: the entry of a block is its place there.

        Args:
            blocks, buckets, chain, bucket_shift: of the table.
            is_hit: a byte for each entry; what has 0 there is for Python, or is noted (`note_hit`).
            dirty: a bitmap; only entries whose bit is set are written to.
            discarded, nr_discard_bits, discard_shift: a bitmap of runs of 2^discard_shift blocks; where a bit is
                set, nothing is written.
            nr_blocks: of the device; what lies behind them is for Python.
        """
        cdef Route route = Route(file, begin, size)
        cdef _Memory all_blocks = route.borrow(blocks), all_buckets = route.borrow(buckets), all_chain = route.borrow(chain)
        cdef _Memory all_hits = route.borrow(is_hit), all_dirty = route.borrow(dirty), all_discarded = route.borrow(discarded)
        cdef uint64_t nr_entries = all_blocks.view.len // 8
        if (
            not block_size or not 0 <= bucket_shift < 64 or not 0 <= discard_shift < 64
            or <uint64_t>all_chain.view.len // 4 < nr_entries or <uint64_t>all_hits.view.len < nr_entries
            or <uint64_t>all_dirty.view.len * 8 < nr_entries
            or <uint64_t>all_discarded.view.len * 8 < nr_discard_bits
        ):
            raise ValueError("the tables do not fit each other")
        route.way.kind = KIND_TABLE
        route.way.blocks = <const uint64_t *>all_blocks.view.buf
        route.way.buckets = <const uint32_t *>all_buckets.view.buf
        route.way.chain = <const uint32_t *>all_chain.view.buf
        route.way.nr_entries = nr_entries
        route.way.nr_buckets = all_buckets.view.len // 4
        route.way.bucket_shift = bucket_shift
        route.way.is_hit = <const uint8_t *>all_hits.view.buf
        route.way.dirty = <const uint8_t *>all_dirty.view.buf
        route.way.discarded = <const uint8_t *>all_discarded.view.buf
        route.way.nr_discard_bits = nr_discard_bits
        route.way.discard_shift = discard_shift
        route.way.block_size = block_size
        route.way.nr_blocks = nr_blocks
        return route

    def close(self):
        """No request takes this way any more; let go of all tables. Reads that are in the ring go on."""
        self.way.is_open = self.way.can_read = self.way.can_write = False
        self.way.kind = KIND_FLAT
        self.way.size = 0
        self.memory.clear()
        self.locked = None
        self.was_served = None
        self.may_sync = None
        self.note_hit = None


# ---- counters ----

cdef Sampling sampling  # of all connections


def chosen_batches(ends_ns):
    """For tests: which batches of a process are timed because it is their turn, if they end at these moments. At the first of them all
    that could be saved up is used up."""
    cdef Sampling found
    cdef bint is_next
    memset(&found, 0, sizeof(found))
    found.since_ns = ends_ns[0]
    chosen = []
    for end_ns in ends_ns:
        is_next = is_chosen(&found)
        if is_next:
            was_chosen(&found, end_ns)
        chosen.append(is_next)
    return chosen


# ---- connections ----

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


# ---- replies ----

cdef inline bint is_zero(const uint8_t *data, size_t length) noexcept nogil:
    return not data[0] and not memcmp(data, data + 1, length - 1)


cdef Py_ssize_t turn_into_hole(uint8_t *reply, uint32_t length) noexcept nogil:
    """Make the header of an OFFSET_HOLE chunk of the one of an OFFSET_DATA chunk. Returns how long it is."""
    cdef uint32_t number = htobe32(length)
    cdef uint32_t payload = htobe32(12)
    if memcmp(reply, EXTENDED_DATA_HEAD, 8) == 0:
        memcpy(reply, EXTENDED_HOLE_HEAD, 8)
        memset(reply + 24, 0, 4)
        memcpy(reply + 28, &payload, 4)
        memcpy(reply + 40, &number, 4)
        return EXTENDED_HOLE_BYTES
    memcpy(reply, HOLE_HEAD, 8)
    memcpy(reply + 16, &payload, 4)
    memcpy(reply + 28, &number, 4)
    return HOLE_BYTES


cdef void pack_waited(uint8_t *reply, Read *read, uint64_t zero_min, Py_ssize_t *out) noexcept nogil:
    """Pack the reply to a READ that has ended."""
    if read.length >= zero_min and is_zero(read.data, read.length):
        read.head_length = turn_into_hole(read.head, read.length)
        read.is_hole = True
    memcpy(reply, read.head, read.head_length)
    if not read.is_hole:
        memcpy(reply + read.head_length, read.data, read.length)
    out[0] += reply_length(read)


cdef inline size_t reply_length(const Read *read) noexcept nogil:
    return read.head_length if read.is_hole else read.head_length + read.length


cdef bytes unsent_part(const Read *read):
    cdef bytes head = read.head[:read.head_length]
    if read.is_hole:
        return head[read.sent:]
    return (head + read.data[:read.length])[read.sent:]


# ---- the event loop ----

cdef class Receiver:
    """What the loop calls when the socket of a connection can be read; see the module head.

    Between the loop and the system calls there is no Python code then, as long as all requests are plain. `Python`
    means here: all code of the connection outside of this module. After it has run, the Receiver looks whether the
    connection is plain: whether its next requests may be served here, from the two buffers. As long as none has run
    since, it need not look. So Python says `python_ran` before the loop may call the Receiver again.

    Args:
        plane: of the connection.
        maybe_route: of the device.
        is_plain: whether the next requests may be served here.
        received, output: where the four places of the two buffers are; see `nbdtarget.server.fast_turn`.
        polling: `last` there is what was called last of all connections; while that is another one, nothing is polled.
        may_poll: whether nothing is in flight that polling would hold up.
        has_no_losses: whether a FLUSH has nothing to tell but its own end.
        find_loop_fd: returns the `loop_fd` of the plane, while the loop watches its socket. Called once, if at all.
        poll_ns: after an answer, how long to look at the socket for the next request.
        poll_streak, poll_skip_max, poll_rest, late: see `nbdtarget.server.poller`.
        readable: what the loop would call instead; for everything that is not plain.
        stopped: goes on from what `Plane.turn` returned, if that is not DONE or POLLED.
        ended: a turn is over, and Python has run before it.
        failed: takes an exception of the others.
    """

    cdef Plane plane
    cdef Route route
    cdef bint is_sure  # Python has not run since the last turn
    cdef object maybe_route
    cdef object is_plain
    cdef object received
    cdef object output
    cdef object polling
    cdef object may_poll
    cdef object has_no_losses
    cdef object find_loop_fd  # None: it was called
    cdef int64_t poll_ns
    cdef unsigned poll_streak
    cdef unsigned poll_skip_max
    cdef unsigned poll_rest
    cdef object late
    cdef unsigned streak  # turns in a row with one request each
    cdef unsigned skip  # turns that are not polled
    cdef unsigned penalty  # how many were skipped after the last miss
    cdef object readable
    cdef object stopped
    cdef object ended
    cdef object failed

    def __init__(self, Plane plane not None, *, maybe_route, is_plain, received, output, polling, may_poll, has_no_losses, find_loop_fd=None,
                 int64_t poll_ns, unsigned poll_streak, unsigned poll_skip_max, unsigned poll_rest, late,
                 readable, stopped, ended, failed):
        self.plane = plane
        self.maybe_route, self.is_plain = maybe_route, is_plain
        self.received, self.output = received, output
        self.polling, self.may_poll, self.has_no_losses = polling, may_poll, has_no_losses
        self.find_loop_fd = find_loop_fd
        self.poll_ns, self.poll_streak = poll_ns, poll_streak
        self.poll_skip_max, self.poll_rest = poll_skip_max, poll_rest
        self.late, plane.late_ns = late, late.late_ns
        self.readable, self.stopped, self.ended, self.failed = readable, stopped, ended, failed

    def python_ran(self):
        """Look anew before the next turn: something of the connection may have changed."""
        self.is_sure = False

    def close(self):
        """The connection is closed: let go of all that refers to it."""
        if self.plane is not None and self.polling.last is self:
            self.polling.last = None
        self.is_sure = False
        self.plane = None
        self.route = None
        self.maybe_route = self.is_plain = self.received = self.output = self.polling = self.may_poll = self.has_no_losses = self.find_loop_fd = None
        self.readable = self.stopped = self.ended = self.failed = None

    def __call__(self):
        try:
            if self.is_sure and self.route.way.is_open:
                self._turn()
            elif self.plane is not None:
                self._look()
        except Exception as error:
            self.is_sure = False
            if self.failed is None:
                raise
            self.failed(error)

    cdef int _look(self) except -1:
        """Python has run: look what there is to do, and do it."""
        self.is_sure = False
        self.route = self.maybe_route()
        if self.route is None or not self.is_plain():
            self.readable()
            return 0
        self.plane.begin, self.plane.end = self.received.begin, self.received.end
        self.plane.base, self.plane.out = self.output.base, self.output.end
        self.is_sure = True
        if self._turn() and self.ended is not None:
            self.ended()
        return 0

    cdef int _verify(self) except -1:
        """For tests: what is thought to be sure is so."""
        cdef Plane plane = self.plane
        if not self.is_plain() or self.route is not self.maybe_route():
            raise AssertionError("Python has run, and has not said so")
        if (plane.begin, plane.end) != (self.received.begin, self.received.end):
            raise AssertionError("the places of the receive buffer have changed")
        if (plane.base, plane.out) != (self.output.base, self.output.end):
            raise AssertionError("the places of the arena have changed")
        return 0

    cdef bint _polls(self) except -1:
        """Whether to look at the socket for the next request after an answer."""
        if self.polling.last is not self:
            self.polling.last = self
            self.streak = 0
        elif self.streak < self.poll_streak:
            self.streak += 1
        if self.skip:
            self.skip -= 1
            return False
        return self.streak >= self.poll_streak and self.poll_ns > 0 and self.may_poll()

    cdef int _lone_sync(self) except -1:
        """What may be synced for in this turn without Python, as far as this connection knows."""
        self.plane.sync_credit -= 1
        if self.streak < self.poll_streak or not self.may_poll():
            return LONE_NOTHING
        if self.find_loop_fd is not None:
            self.plane.loop_fd = self.find_loop_fd()
            self.find_loop_fd = None
        return LONE_ALL if self.has_no_losses() else LONE_FUA

    cdef bint _turn(self) except -1:
        """Returns whether everything is served."""
        cdef Plane plane = self.plane
        cdef Py_ssize_t begin, end, base, out
        cdef int64_t poll_ns
        cdef int stop
        poll_ns = self.poll_ns if self._polls() else 0
        plane.waits = self.streak >= self.poll_streak and self.poll_ns > 0
        if plane.poison:
            self._verify()
        begin, end, base, out = plane.begin, plane.end, plane.base, plane.out
        stop = plane._go(self.route, poll_ns, False, self._lone_sync() if plane.sync_credit else LONE_NOTHING)
        if self.plane is None:
            return False  # a callback has closed the connection
        # What has not changed need not be said.
        if plane.begin != begin or plane.end != end:
            self.received.served(plane.begin, plane.end)
        if plane.base != base or plane.out != out:
            self.output.sent_to(plane.base, plane.out)
        if plane.nr_syncs:
            plane.flush_for(*plane.take_syncs())
            if self.plane is None:
                return False
        if plane.nr_hits or plane.nr_sync_hits:
            # A client that waits for the disk each time leaves the processor alone for most of the time.
            self.penalty = 0
            self.skip = min(plane.nr_hits, 1 << 20) * self.poll_rest
        if plane.was_late:
            self.skip += <unsigned>self.late.note_late()
        elif plane.nr_hits or plane.nr_sync_hits:
            self.late.note_hits(plane.nr_hits + plane.nr_sync_hits)
        if plane.was_batch:
            self.streak = 0
        if stop == STOP_DONE:
            return True
        if stop == STOP_POLLED:
            self.penalty = min(2 * self.penalty + 1, self.poll_skip_max)
            self.skip += self.penalty
            return True
        self.is_sure = False
        self.stopped(stop)
        return False
