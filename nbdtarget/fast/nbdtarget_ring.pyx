# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Reads of files through io_uring: many at a time, without a thread for any of them.

Theory of operation. The kernel and this process share two rings. `Ring.read` writes an entry into the one of
submissions; `flush` tells the kernel of all new entries with one system call. When reads have ended, the kernel writes to an
eventfd, which the event loop watches; `reap` then takes what has ended from the ring of completions.

    read, read, read ... flush        one io_uring_enter for all of them
    eventfd is readable: reap         -> [(done, result), ...]

A read holds its buffer until it is reaped: the kernel writes into that memory at any time before. A ring that is
dropped with reads under way therefore keeps their buffers for ever, rather than let the kernel write into
memory that has another use by then.

Some reads the kernel cannot begin without waiting, for example on a network file system: it gives each of them to a
thread of its own. All rings of a process share these threads, a few for each processor. So that a disk that hangs
does not take them all, and hold up the reads of the others, there may be as many as there are reads.

Containers often forbid io_uring. Some answer with an error, some end the process that tries. So `is_available` tries it
in a child process first.
"""

from cpython.buffer cimport (
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.errno cimport EAGAIN, EBUSY, EINTR, errno
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memset

cdef extern from *:
    """
    #include <errno.h>
    #include <linux/io_uring.h>
    #include <stdint.h>
    #include <sys/eventfd.h>
    #include <sys/mman.h>
    #include <sys/syscall.h>
    #include <sys/wait.h>
    #include <unistd.h>

    static inline unsigned load_acquire(unsigned *place) { return __atomic_load_n(place, __ATOMIC_ACQUIRE); }
    static inline void store_release(unsigned *place, unsigned value) { __atomic_store_n(place, value, __ATOMIC_RELEASE); }
    static inline int ring_setup(unsigned entries, struct io_uring_params *params) {
        return (int)syscall(__NR_io_uring_setup, entries, params);
    }
    static inline int ring_enter(int fd, unsigned nr_submitted) {
        return (int)syscall(__NR_io_uring_enter, fd, nr_submitted, 0, 0, NULL, 0);
    }
    static inline int ring_register_eventfd(int fd, int *event_fd) {
        return (int)syscall(__NR_io_uring_register, fd, IORING_REGISTER_EVENTFD, event_fd, 1);
    }
    /* IORING_REGISTER_IOWQ_MAX_WORKERS (Linux 5.15), which older headers lack. */
    static inline int ring_register_workers(int fd, unsigned nr_max) {
        unsigned nrs_max[2] = {nr_max, 0};
        return (int)syscall(__NR_io_uring_register, fd, 19, nrs_max, 2);
    }
    static inline void *ring_map(int fd, size_t length, uint64_t offset) {
        void *memory = mmap(NULL, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, fd, (off_t)offset);
        return memory == MAP_FAILED ? NULL : memory;
    }
    /* Nothing but system calls between fork and _exit: the process may have other threads. */
    static int try_in_child(void) {
        struct io_uring_params params = {0};
        int status = 0;
        pid_t child = fork();
        if (child == 0) {
            int fd = ring_setup(4, &params);
            _exit(fd < 0 || ring_enter(fd, 0) < 0);
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
    int ring_setup(unsigned entries, io_uring_params *params) nogil
    int ring_enter(int fd, unsigned nr_submitted) nogil
    int ring_register_eventfd(int fd, int *event_fd) nogil
    int ring_register_workers(int fd, unsigned nr_max) nogil
    void *ring_map(int fd, size_t length, uint64_t offset) nogil
    int try_in_child() nogil

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
    struct io_uring_params:
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
    int IORING_FEAT_SINGLE_MMAP
    uint64_t IORING_OFF_SQ_RING
    uint64_t IORING_OFF_SQES

__all__ = ["ABI", "Ring", "is_available"]

ABI = 2  # of `nbdtarget.fast.compiled`


def is_available():
    """Whether this process may use io_uring; some containers end a process that tries."""
    cdef int answer
    with nogil:
        answer = try_in_child()
    return bool(answer)


cdef class Ring:
    """See the module head.

    Args:
        nr_reads_max: reads under way at once; a power of two.

    Attributes:
        event_fd: readable when something can be reaped.
        nr_reads: reads that have not been reaped.

    Raises: OSError: there is no io_uring for us.
    """

    cdef int fd
    cdef readonly int event_fd
    cdef readonly unsigned nr_reads
    cdef unsigned nr_new  # written, and not yet told to the kernel
    cdef unsigned nr_slots
    cdef void *rings
    cdef size_t rings_length
    cdef io_uring_sqe *entries
    cdef size_t entries_length
    cdef unsigned *sq_tail
    cdef unsigned *sq_array
    cdef unsigned sq_mask
    cdef unsigned *cq_head
    cdef unsigned *cq_tail
    cdef unsigned cq_mask
    cdef io_uring_cqe *completions
    cdef Py_buffer *views
    cdef list done  # by slot
    cdef list free_slots

    def __cinit__(self):
        self.fd = self.event_fd = -1

    def __init__(self, unsigned nr_reads_max=256):
        cdef io_uring_params params
        cdef uint8_t *base
        assert self.fd < 0, "made once"
        memset(&params, 0, sizeof(params))
        self.fd = ring_setup(nr_reads_max, &params)
        if self.fd < 0:
            raise OSError(errno, "io_uring_setup")
        if not params.features & IORING_FEAT_SINGLE_MMAP:
            raise OSError(EBUSY, "this kernel's io_uring is too old")
        self.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.event_fd < 0 or ring_register_eventfd(self.fd, &self.event_fd) < 0:
            raise OSError(errno, "io_uring_register")
        ring_register_workers(self.fd, params.sq_entries)  # where the kernel can
        # One mapping for both rings: as long as the longer one.
        self.rings_length = max(
            <size_t>params.sq_off.array + params.sq_entries * sizeof(unsigned),
            <size_t>params.cq_off.cqes + params.cq_entries * sizeof(io_uring_cqe),
        )
        self.entries_length = params.sq_entries * sizeof(io_uring_sqe)
        self.rings = ring_map(self.fd, self.rings_length, IORING_OFF_SQ_RING)
        self.entries = <io_uring_sqe *>ring_map(self.fd, self.entries_length, IORING_OFF_SQES)
        self.nr_slots = params.sq_entries
        self.views = <Py_buffer *>calloc(self.nr_slots, sizeof(Py_buffer))
        if self.rings == NULL or self.entries == NULL or self.views == NULL:
            raise MemoryError("io_uring")
        base = <uint8_t *>self.rings
        self.sq_tail = <unsigned *>(base + params.sq_off.tail)
        self.sq_array = <unsigned *>(base + params.sq_off.array)
        self.sq_mask = (<unsigned *>(base + params.sq_off.ring_mask))[0]
        self.cq_head = <unsigned *>(base + params.cq_off.head)
        self.cq_tail = <unsigned *>(base + params.cq_off.tail)
        self.cq_mask = (<unsigned *>(base + params.cq_off.ring_mask))[0]
        self.completions = <io_uring_cqe *>(base + params.cq_off.cqes)
        self.done = [None] * self.nr_slots
        self.free_slots = list(range(self.nr_slots))

    def __dealloc__(self):
        # While reads are under way, their buffers and this memory are the kernel's.
        if self.nr_reads == 0:
            if self.rings != NULL:
                munmap(self.rings, self.rings_length)
            if self.entries != NULL:
                munmap(self.entries, self.entries_length)
            free(self.views)
        if self.fd >= 0:
            close(self.fd)
        if self.event_fd >= 0:
            close(self.event_fd)

    def read(self, int fd, buffer not None, uint64_t offset, done) -> bool:
        """Begin to fill `buffer` from a file; `flush` must follow. Returns False if too many reads are under way.

        Args:
            fd: must stay open until `flush`.
            done: what `reap` returns with the number of bytes read, or minus the errno.
        """
        cdef unsigned slot, tail, index
        cdef io_uring_sqe *entry
        if not self.free_slots:
            return False
        slot = self.free_slots.pop()
        try:
            PyObject_GetBuffer(buffer, &self.views[slot], PyBUF_WRITABLE)
        except BaseException:
            self.free_slots.append(slot)
            raise
        if self.views[slot].len > 0x7FFFF000:  # more than the kernel reads at once
            PyBuffer_Release(&self.views[slot])
            self.free_slots.append(slot)
            return False
        self.done[slot] = done
        tail = self.sq_tail[0]  # nobody else writes it
        index = tail & self.sq_mask
        entry = &self.entries[index]
        memset(entry, 0, sizeof(io_uring_sqe))
        entry.opcode = IORING_OP_READ
        entry.fd = fd
        entry.off = offset
        entry.addr = <uint64_t>self.views[slot].buf
        entry.len = <uint32_t>self.views[slot].len
        entry.user_data = slot
        self.sq_array[index] = index
        store_release(self.sq_tail, tail + 1)
        self.nr_new += 1
        self.nr_reads += 1
        return True

    def flush(self) -> bool:
        """Tell the kernel of all new reads. Returns False if it took not all of them now: call again.

        Raises: OSError.
        """
        cdef int taken
        while self.nr_new:
            with nogil:
                taken = ring_enter(self.fd, self.nr_new)
            if taken < 0:
                if errno == EINTR:
                    continue
                if errno in (EAGAIN, EBUSY):
                    return False
                raise OSError(errno, "io_uring_enter")
            self.nr_new -= taken
            if not taken:
                return False
        return True

    def reap(self) -> list:
        """Return what has ended, each with its `done` and its result."""
        cdef uint64_t count
        cdef unsigned head, tail, slot
        cdef io_uring_cqe *completion
        cdef list ended = []
        sys_read(self.event_fd, &count, sizeof(count))
        head = self.cq_head[0]  # nobody else writes it
        tail = load_acquire(self.cq_tail)
        while head != tail:
            completion = &self.completions[head & self.cq_mask]
            slot = <unsigned>completion.user_data
            if slot < self.nr_slots and self.done[slot] is not None:
                ended.append((self.done[slot], completion.res))
                self.done[slot] = None
                PyBuffer_Release(&self.views[slot])
                self.free_slots.append(slot)
                self.nr_reads -= 1
            head += 1
        store_release(self.cq_head, head)
        return ended
