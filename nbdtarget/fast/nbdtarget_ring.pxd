# SPDX-License-Identifier: Apache-2.0
"""The C side of `nbdtarget_ring`, for `nbdtarget_fast`: reads without a Python object, and without the interpreter's lock."""

from libc.stdint cimport int64_t, uint8_t, uint32_t, uint64_t

cdef struct Read:
    # One read, from `begin_read` to `give_back`.
    Read *next  # in the list that it is in
    Reader *reader
    Uring *uring
    uint8_t *data  # at least `length` bytes, aligned for direct I/O
    uint32_t room  # of `data`
    uint32_t length
    int result  # the bytes that were read, or minus the errno
    # What follows is its reader's.
    Read *after  # in a list of its own
    void *route
    void *file
    uint64_t offset  # of the request
    int64_t begun_ns
    uint64_t block
    size_t sent  # bytes of its reply
    size_t head_length
    bint is_hole  # the reply is its head alone
    uint8_t head[44]  # of its reply

cdef struct Reader:
    # Who has reads in the ring.
    Read *first  # that have ended, in their order
    Read *last
    Reader *next  # that has some
    bint is_listed
    void *owner  # its `reads_ended` is to be called; whoever has reads under way keeps it alive

cdef struct Uring:
    # A ring; the fields are those of `Ring`.
    int fd
    int event_fd
    bint is_deferring  # the kernel finishes reads only when it is asked to
    bint can_wait
    unsigned nr_reads  # that have not been reaped
    unsigned nr_new  # written, and not yet told to the kernel
    unsigned nr_slots
    unsigned *sq_tail
    unsigned *sq_array
    unsigned sq_mask
    unsigned *cq_head
    unsigned *cq_tail
    unsigned *cq_flags
    unsigned cq_mask
    void *entries
    void *completions
    Read *slots
    Read *free_slots
    Reader python  # of `Ring.read`
    Reader *readers  # that have reads which have ended
    void *kept[16]  # buffers for the next reads, by their sizes
    size_t kept_bytes

cdef Read *begin_read(Uring *uring, Reader *reader, int fd, uint64_t offset, uint32_t length) noexcept nogil
cdef void give_back(Read *read) noexcept nogil
cdef int submit(Uring *uring) noexcept nogil
cdef bint submit_and_wait(Uring *uring, uint64_t wait_ns) noexcept nogil
cdef Read *take_ended(Uring *uring, Reader *reader) noexcept nogil

cdef class Ring:
    cdef Uring uring
    cdef void *rings
    cdef size_t rings_length
    cdef size_t entries_length
    cdef void *views  # by slot: Py_buffer
    cdef list done  # by slot
    cdef public object left_over
