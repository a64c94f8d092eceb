# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Reads of files through io_uring: many at a time, without a thread for any of them.

Theory of operation. The kernel and this process share two rings. `Ring.read` writes an entry into the one of
submissions; `flush` tells the kernel of all new entries with one system call. When reads have ended, the kernel writes to an
eventfd, which the event loop watches; `reap` then takes what has ended from the ring of completions.

    read, read, read ... flush        one io_uring_enter for all of them
    eventfd is readable: reap         -> [(done, result), ...]

Where it can (since Linux 6.1), the kernel finishes reads only when it is asked to: it wakes the loop once for
all that have come from the disk meanwhile, and `reap` has them copied in one go.

A read holds its buffer until it is reaped: the kernel writes into that memory at any time before. A ring that is
dropped with reads under way therefore keeps their buffers for ever, rather than let the kernel write into
memory that has another use by then.

Reads without Python. `nbdtarget_fast` reads through the same ring, by the functions of `nbdtarget_ring.pxd`, which need no
lock of the interpreter. `begin_read` takes a buffer, too; what has ended waits in the list of its `Reader`, and
`reap` returns one entry for the whole list.

Some reads the kernel cannot begin without waiting, for example on a network file system: it gives each of them to a
thread of its own. All rings of a process share these threads, a few for each processor. So that a disk that hangs
does not take them all, and hold up the reads of the others, there may be as many as there are reads.

Containers often forbid io_uring. Some answer with an error, some end the process that tries. So `is_available` tries it
in a child process first. The child shares the memory of this process, and only the thread that asks waits for it.
"""

from cpython.buffer cimport (
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.errno cimport EAGAIN, EBUSY, EINTR, EINVAL, errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/io_uring.h>
    #include <stdint.h>
    #include <stdlib.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>

    /* Older headers lack these. */
    #define SETUP_SINGLE_ISSUER (1U << 12) /* Linux 6.0 */
    #define SETUP_DEFER_TASKRUN (1U << 13) /* Linux 6.1 */
    #define FEAT_EXT_ARG (1U << 8) /* Linux 5.11 */
    #define ENTER_EXT_ARG (1U << 3)
    #define CQ_EVENTFD_DISABLED (1U << 0) /* Linux 5.8 */
    #define REGISTER_IOWQ_MAX_WORKERS 19 /* Linux 5.15 */

    static inline unsigned load_acquire(unsigned *place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    static inline void store_release(unsigned *place, unsigned value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }
    /* What is stored before it is seen by others before anything is loaded after it. */
    static inline void full_barrier(void) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
    static inline int ring_setup(unsigned entries, struct io_uring_params *params) {
        return (int)syscall(__NR_io_uring_setup, entries, params);
    }
    static inline int ring_enter(int fd, unsigned nr_submitted, unsigned flags) {
        return (int)syscall(__NR_io_uring_enter, fd, nr_submitted, 0, flags, NULL, 0);
    }
    /* Wait for one read at most so long. */
    static inline int ring_enter_and_wait(int fd, unsigned nr_submitted, uint64_t wait_ns) {
        struct { int64_t seconds, ns; } time = {(int64_t)(wait_ns / 1000000000), (int64_t)(wait_ns % 1000000000)};
        struct { uint64_t mask; uint32_t mask_size, pad; uint64_t time; } arg = {0, 0, 0, (uint64_t)(uintptr_t)&time};
        return (int)syscall(
            __NR_io_uring_enter, fd, nr_submitted, 1, IORING_ENTER_GETEVENTS | ENTER_EXT_ARG, &arg, sizeof arg);
    }
    static inline int ring_register_eventfd(int fd, int *event_fd) {
        return (int)syscall(__NR_io_uring_register, fd, IORING_REGISTER_EVENTFD, event_fd, 1);
    }
    static inline int ring_register_workers(int fd, unsigned nr_max) {
        unsigned nrs_max[2] = {nr_max, 0};
        return (int)syscall(__NR_io_uring_register, fd, REGISTER_IOWQ_MAX_WORKERS, nrs_max, 2);
    }
    static inline void *ring_map(int fd, size_t length, uint64_t offset) {
        void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
        return memory == MAP_FAILED ? NULL : memory;
    }
    static inline void *aligned(size_t alignment, size_t length) {
        void *memory = NULL;
        return posix_memalign(&memory, alignment, length) ? NULL : memory;
    }
    /* Nothing but system calls between vfork and _exit: the child runs in the memory of this process. */
    static __attribute__((noinline)) int try_in_child(void) {
        struct io_uring_params params = {0};
        int status = 0;
        pid_t child = vfork();
        if (child == 0) {
            int fd = ring_setup(4, &params);
            _exit(fd < 0 || ring_enter(fd, 0, 0) < 0);
        }
        if (child < 0)
            return 0;
        while (waitpid(child, &status, 0) < 0)
            if (errno != EINTR)
                return 0; /* SIGCHLD is ignored: the kernel keeps no exit status, and io_uring is not risked */
        return WIFEXITED(status) && WEXITSTATUS(status) == 0;
    }
    """
    unsigned load_acquire(unsigned *place) nogil
    void store_release(unsigned *place, unsigned value) nogil
    void full_barrier() nogil
    int ring_setup(unsigned entries, io_uring_params *params) nogil
    int ring_enter(int fd, unsigned nr_submitted, unsigned flags) nogil
    int ring_enter_and_wait(int fd, unsigned nr_submitted, uint64_t wait_ns) nogil
    int ring_register_eventfd(int fd, int *event_fd) nogil
    int ring_register_workers(int fd, unsigned nr_max) nogil
    void *ring_map(int fd, size_t length, uint64_t offset) nogil
    void *aligned(size_t alignment, size_t length) nogil
    int try_in_child() nogil

    unsigned SETUP_SINGLE_ISSUER
    unsigned SETUP_DEFER_TASKRUN
    unsigned FEAT_EXT_ARG
    unsigned CQ_EVENTFD_DISABLED
    int EFD_NONBLOCK
    int EFD_CLOEXEC
    int eventfd(unsigned value, int flags) nogil
    int munmap(void *memory, size_t length) nogil
    int close(int fd) nogil
    ssize_t sys_read "read"(int fd, void *data, size_t length) nogil

    struct io_sqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t array
    struct io_cqring_offsets:
        uint32_t head
        uint32_t tail
        uint32_t ring_mask
        uint32_t cqes
        uint32_t flags
    struct io_uring_params:
        uint32_t flags
        uint32_t sq_entries
        uint32_t cq_entries
        uint32_t features
        io_sqring_offsets sq_off
        io_cqring_offsets cq_off
    struct io_uring_sqe:
        uint8_t opcode
        int32_t fd
        uint64_t off
        uint64_t addr
        uint32_t len
        uint64_t user_data
    struct io_uring_cqe:
        uint64_t user_data
        int32_t res
    int IORING_OP_READ
    unsigned IORING_FEAT_SINGLE_MMAP
    unsigned IORING_ENTER_GETEVENTS
    uint64_t IORING_OFF_SQ_RING
    uint64_t IORING_OFF_SQES

__all__ = ["ABI", "Ring", "is_available"]

ABI = 14  # of `nbdtarget.fast.compiled`

cdef enum:
    PAGE = 4096  # buffers are aligned to it, which suits direct I/O of every disk
    PAGE_SHIFT = 12
    KEPT_SIZES = 16  # a page, two pages, four ...
    KEPT_BYTES_MAX = 1 << 20  # so much memory is kept for the next reads


def is_available():
    """Whether this process may use io_uring; some containers end a process that tries."""
    cdef int answer
    with nogil:
        answer = try_in_child()
    return bool(answer)


# ---- buffers ----

cdef inline int size_of(uint32_t length) noexcept nogil:
    """Return the number of the smallest size that `length` fits into."""
    cdef int nr = 0
    while (<uint64_t>PAGE << nr) < length:
        nr += 1
    return nr


cdef uint8_t *take_buffer(Uring *uring, uint32_t length, uint32_t *room) noexcept nogil:
    cdef int nr = size_of(length)
    cdef void *buffer
    if nr >= KEPT_SIZES:
        return NULL
    room[0] = <uint32_t>PAGE << nr
    buffer = uring.kept[nr]
    if buffer == NULL:
        return <uint8_t *>aligned(PAGE, room[0])
    uring.kept[nr] = (<void **>buffer)[0]
    uring.kept_bytes -= room[0]
    return <uint8_t *>buffer


cdef void keep_buffer(Uring *uring, void *buffer, uint32_t room) noexcept nogil:
    """The buffer is free; what is kept of them lies in lists, by the first word of each."""
    cdef int nr = size_of(room)
    if uring.kept_bytes + room > KEPT_BYTES_MAX:
        free(buffer)
        return
    (<void **>buffer)[0] = uring.kept[nr]
    uring.kept[nr] = buffer
    uring.kept_bytes += room


# ---- reads ----

cdef Read *take_slot(Uring *uring) noexcept nogil:
    cdef Read *read = uring.free_slots
    if read != NULL:
        uring.free_slots = read.next
        read.next = NULL
    return read


cdef void free_slot(Uring *uring, Read *read) noexcept nogil:
    read.next = uring.free_slots
    uring.free_slots = read


cdef void enter_read(Uring *uring, Read *read, int fd, uint64_t offset) noexcept nogil:
    """Write the entry of a read whose place is known. There is room: each slot has one entry."""
    cdef unsigned tail = uring.sq_tail[0]  # nobody else writes it
    cdef unsigned index = tail & uring.sq_mask
    cdef io_uring_sqe *entry = &(<io_uring_sqe *>uring.entries)[index]
    memset(entry, 0, sizeof(io_uring_sqe))
    entry.opcode = IORING_OP_READ
    entry.fd = fd
    entry.off = offset
    entry.addr = <uint64_t>read.data
    entry.len = read.length
    entry.user_data = <uint64_t>(read - uring.slots)
    uring.sq_array[index] = index
    store_release(uring.sq_tail, tail + 1)
    uring.nr_new += 1
    uring.nr_reads += 1


cdef Read *begin_read(Uring *uring, Reader *reader, int fd, uint64_t offset, uint32_t length) noexcept nogil:
    """Begin a read into a buffer of its own; `submit` must follow. NULL: there is no room for one more.

    Args: fd: must stay open until `submit` has taken all.
    """
    cdef Read *read = take_slot(uring)
    if read == NULL:
        return NULL
    read.data = take_buffer(uring, length, &read.room)
    if read.data == NULL:
        free_slot(uring, read)
        return NULL
    read.reader = reader
    read.uring = uring
    read.length = length
    enter_read(uring, read, fd, offset)
    return read


cdef void give_back(Read *read) noexcept nogil:
    """A read that was begun by `begin_read` and taken by `take_ended` is not needed any more."""
    cdef Uring *uring = read.uring
    keep_buffer(uring, read.data, read.room)
    read.data = NULL
    read.reader = NULL
    free_slot(uring, read)


cdef int submit(Uring *uring) noexcept nogil:
    """Tell the kernel of all new reads. Returns 0, or the errno if it did not take them all now."""
    cdef int taken
    while uring.nr_new:
        taken = ring_enter(uring.fd, uring.nr_new, 0)
        if taken < 0:
            if errno == EINTR:
                continue
            return errno
        uring.nr_new -= taken
        if not taken:
            return EAGAIN
    return 0


cdef bint submit_and_wait(Uring *uring, uint64_t wait_ns) noexcept nogil:
    """Submit the only read that is under way, and wait for it. Returns whether it has ended."""
    cdef uint64_t count
    cdef int taken
    if uring.is_deferring:
        # Nobody need be woken: neither the eventfd is written to, nor must it be read.
        store_release(uring.cq_flags, CQ_EVENTFD_DISABLED)
    taken = ring_enter_and_wait(uring.fd, uring.nr_new, wait_ns)
    if taken > 0:
        uring.nr_new -= taken
    drain(uring)
    if uring.is_deferring:
        store_release(uring.cq_flags, 0)
        if uring.nr_reads:
            # It came too late, or just before the eventfd was enabled again. What ends after this says so.
            full_barrier()
            ring_enter(uring.fd, 0, IORING_ENTER_GETEVENTS)
            drain(uring)
    else:
        # The eventfd was written to, or will be: it is read, so that the loop is not woken for nothing.
        sys_read(uring.event_fd, &count, sizeof(count))
    return uring.nr_reads == 0


cdef void drain(Uring *uring) noexcept nogil:
    """Put what has ended into the lists of those who wait for it."""
    cdef unsigned head = uring.cq_head[0]  # nobody else writes it
    cdef unsigned tail = load_acquire(uring.cq_tail)
    cdef io_uring_cqe *completion
    cdef Read *read
    cdef Reader *reader
    while head != tail:
        completion = &(<io_uring_cqe *>uring.completions)[head & uring.cq_mask]
        if completion.user_data < uring.nr_slots:
            read = &uring.slots[completion.user_data]
            read.result = completion.res
            read.next = NULL
            uring.nr_reads -= 1
            reader = read.reader
            if reader.first == NULL:
                reader.first = read
            else:
                reader.last.next = read
            reader.last = read
            if not reader.is_listed:
                reader.is_listed = True
                reader.next = uring.readers
                uring.readers = reader
        head += 1
    store_release(uring.cq_head, head)


cdef Read *take_ended(Uring *uring, Reader *reader) noexcept nogil:
    """Return the reads of `reader` that have ended, as a list; they are the caller's until `give_back`."""
    cdef Read *first = reader.first
    cdef Reader **place = &uring.readers
    reader.first = reader.last = NULL
    if reader.is_listed:
        reader.is_listed = False
        while place[0] != reader:
            place = &place[0].next
        place[0] = reader.next
    return first


cdef class Ring:
    """See the module head.

    Args:
        nr_reads_max: reads under way at once; a power of two.

    Attributes:
        event_fd: readable when something can be reaped.
        nr_reads: reads that have not been reaped.
        left_over: is called when the kernel did not take all reads of `nbdtarget_fast`; or None. `flush` is to be tried again.

    Raises: OSError: there is no io_uring for us.
    """

    def __cinit__(self):
        self.uring.fd = self.uring.event_fd = -1

    def __init__(self, unsigned nr_reads_max=256):
        cdef io_uring_params params
        cdef Uring *uring = &self.uring
        cdef uint8_t *base
        cdef unsigned nr
        assert uring.fd < 0, "made once"
        memset(&params, 0, sizeof(params))
        params.flags = SETUP_SINGLE_ISSUER | SETUP_DEFER_TASKRUN
        uring.fd = ring_setup(nr_reads_max, &params)
        uring.is_deferring = uring.fd >= 0
        if uring.fd < 0 and errno == EINVAL:
            memset(&params, 0, sizeof(params))
            uring.fd = ring_setup(nr_reads_max, &params)
        if uring.fd < 0:
            raise OSError(errno, "io_uring_setup")
        if not params.features & IORING_FEAT_SINGLE_MMAP:
            raise OSError(EBUSY, "this kernel's io_uring is too old")
        uring.can_wait = params.features & FEAT_EXT_ARG != 0
        uring.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if uring.event_fd < 0 or ring_register_eventfd(uring.fd, &uring.event_fd) < 0:
            raise OSError(errno, "io_uring_register")
        ring_register_workers(uring.fd, params.sq_entries)  # where the kernel can
        # One mapping for both rings: as long as the longer one.
        self.rings_length = max(
            <size_t>params.sq_off.array + params.sq_entries * sizeof(unsigned),
            <size_t>params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
        )
        self.entries_length = params.sq_entries * sizeof(io_uring_sqe)
        self.rings = ring_map(uring.fd, self.rings_length, IORING_OFF_SQ_RING)
        uring.entries = ring_map(uring.fd, self.entries_length, IORING_OFF_SQES)
        uring.nr_slots = params.sq_entries
        uring.slots = <Read *>calloc(uring.nr_slots, sizeof(Read))
        self.views = calloc(uring.nr_slots, sizeof(Py_buffer))
        if self.rings == NULL or uring.entries == NULL or uring.slots == NULL or self.views == NULL:
            raise MemoryError("io_uring")
        base = <uint8_t *>self.rings
        uring.sq_tail = <unsigned *>(base + params.sq_off.tail)
        uring.sq_array = <unsigned *>(base + params.sq_off.array)
        uring.sq_mask = (<unsigned *>(base + params.sq_off.ring_mask))[0]
        uring.cq_head = <unsigned *>(base + params.cq_off.head)
        uring.cq_tail = <unsigned *>(base + params.cq_off.tail)
        uring.cq_mask = (<unsigned *>(base + params.cq_off.ring_mask))[0]
        uring.cq_flags = <unsigned *>(base + params.cq_off.flags)
        uring.completions = base + params.cq_off.cqes
        self.done = [None] * uring.nr_slots
        for nr in range(uring.nr_slots):
            free_slot(uring, &uring.slots[nr])

    def __dealloc__(self):
        cdef int nr
        cdef void *buffer
        # While reads are under way, their buffers and this memory are the kernel's.
        if self.uring.nr_reads == 0:
            if self.rings != NULL:
                munmap(self.rings, self.rings_length)
            if self.uring.entries != NULL:
                munmap(self.uring.entries, self.entries_length)
            free(self.views)
            free(self.uring.slots)
        for nr in range(KEPT_SIZES):
            while self.uring.kept[nr] != NULL:
                buffer = self.uring.kept[nr]
                self.uring.kept[nr] = (<void **>buffer)[0]
                free(buffer)
        if self.uring.fd >= 0:
            close(self.uring.fd)
        if self.uring.event_fd >= 0:
            close(self.uring.event_fd)

    @property
    def event_fd(self):
        return self.uring.event_fd

    @property
    def nr_reads(self):
        return self.uring.nr_reads

    @property
    def kept_bytes(self):
        """Memory that is kept for the next reads of `nbdtarget_fast`."""
        return self.uring.kept_bytes

    def read(self, int fd, buffer not None, uint64_t offset, done) -> bool:
        """Begin to fill `buffer` from a file; `flush` must follow. Returns False if too many reads are under way.

        Args:
            fd: must stay open until `flush`.
            done: what `reap` returns with the number of bytes read, or minus the errno.
        """
        cdef Read *read = take_slot(&self.uring)
        cdef Py_ssize_t slot
        cdef Py_buffer *view
        if read == NULL:
            return False
        slot = read - self.uring.slots
        view = &(<Py_buffer *>self.views)[slot]
        try:
            PyObject_GetBuffer(buffer, view, PyBUF_WRITABLE)
        except BaseException:
            free_slot(&self.uring, read)
            raise
        if view.len > 0x7FFFF000:  # more than the kernel reads at once
            PyBuffer_Release(view)
            free_slot(&self.uring, read)
            return False
        self.done[slot] = done
        read.reader = &self.uring.python
        read.data = <uint8_t *>view.buf
        read.length = <uint32_t>view.len
        enter_read(&self.uring, read, fd, offset)
        return True

    def flush(self) -> bool:
        """Tell the kernel of all new reads. Returns False if it took not all of them now: call again.

        Raises: OSError.
        """
        cdef int error
        with nogil:
            error = submit(&self.uring)
        if error and error not in (EAGAIN, EBUSY):
            raise OSError(error, "io_uring_enter")
        return not error

    def reap(self) -> list:
        """Return what has ended, each with its `done` and its result; for `nbdtarget_fast`, what is to be called with 0."""
        cdef uint64_t count
        cdef Py_ssize_t slot
        cdef Read *read
        cdef Read *after
        cdef Reader *reader
        cdef list ended = []
        with nogil:
            sys_read(self.uring.event_fd, &count, sizeof(count))
            if self.uring.is_deferring:
                ring_enter(self.uring.fd, 0, IORING_ENTER_GETEVENTS)
            drain(&self.uring)
        read = take_ended(&self.uring, &self.uring.python)
        while read != NULL:
            after = read.next
            slot = read - self.uring.slots
            ended.append((self.done[slot], read.result))
            self.done[slot] = None
            PyBuffer_Release(&(<Py_buffer *>self.views)[slot])
            free_slot(&self.uring, read)
            read = after
        # They stay in the list: `take_ended` takes them out.
        reader = self.uring.readers
        while reader != NULL:
            ended.append(((<object>reader.owner).reads_ended, 0))
            reader = reader.next
        return ended
