# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Bulk copies in threads that do not need the interpreter: from connections to an NBD server, or from a file, into a file.

Theory of operation. A thread of a copy that needs Python's lock for a few microseconds a chunk may lose its processor while it has
the lock. Then the event loop waits for that thread, and so do all clients. So the whole way of a chunk is here, without the lock:

    loop     `put`: a copy of a range goes into the queue of all threads
    thread   `work`: take chunks, as many as there are buffers; ask the server for them; write the one whose answer is complete
             first, and use its buffer again
    loop     `take_ended`: the eventfd says that copies have ended

A `Copies` is one file, and the `CopyStream`s that are lent for it: connections to one server, or one file for several threads, each with a Python thread that stays in
`work` until the copies are closed or its connection breaks. What happens then is Python's: see `nbdtarget.devices.bulk`, whose rules hold here
as well. A chunk that fails ends its copy, and the rest of that copy is not begun. A copy has ended when the last system call of its
chunks has returned.

*The wire.* Replies to READ are understood as `nbdtarget_protocol.client_transmission` understands them, with the same checks: simple, structured, or with
extended headers; in several pieces, of data or zeroes, in any order. A server that breaks a rule breaks the stream. The number of pieces that lie apart
is bounded by SPANS_MAX for a chunk.

*Giving way.* While clients are served, the copies may be told to give way (`give_way`): then no more chunks are under way than the bound says,
they are smaller, and each system call moves PIECE_BYTES at most. For in the kernel a thread keeps its processor until the system call
returns, and each chunk that is under way keeps one processor busy, here or where its server runs on the same machine. A thread that finds the
bound reached sleeps until others end: those who end a chunk look for the next one themselves, so only the end of the bound, of the
copies, or of a stream wakes it.

*Memory.* Each thread allocates its buffers in `work`, and frees them there. Numbers from the server are compared with the length of the
chunk before they are used. What it takes to remember pieces that lie apart grows with their number.

*Locks.* One mutex guards the queue and all copies. Another one is held while a chunk is written: a file takes one buffered write at a
time in any case, and threads that wait in the kernel for that spin.
"""

from cpython.mem cimport PyMem_RawFree, PyMem_RawMalloc
from libc.errno cimport EINTR, EINVAL, EIO, ENOMEM, errno
from libc.stdint cimport int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdio cimport snprintf
from libc.stdlib cimport calloc, free, realloc
from libc.string cimport memcpy, memmove, memset

import os

cdef extern from "<sys/types.h>" nogil:
    ctypedef long off_t

cdef extern from "<unistd.h>" nogil:
    ssize_t pread(int fd, void *data, size_t length, off_t offset)
    ssize_t pwrite(int fd, const void *data, size_t length, off_t offset)
    ssize_t sys_read "read"(int fd, void *data, size_t length)
    ssize_t sys_write "write"(int fd, const void *data, size_t length)
    int close(int fd)

cdef extern from "<sys/eventfd.h>" nogil:
    int eventfd(unsigned value, int flags)
    int EFD_NONBLOCK
    int EFD_CLOEXEC

cdef extern from "<sys/socket.h>" nogil:
    ssize_t recv(int fd, void *data, size_t length, int flags)
    ssize_t send(int fd, const void *data, size_t length, int flags)
    int MSG_NOSIGNAL
    int MSG_WAITALL

cdef extern from "<endian.h>" nogil:
    uint16_t be16toh(uint16_t value)
    uint32_t be32toh(uint32_t value)
    uint64_t be64toh(uint64_t value)
    uint16_t htobe16(uint16_t value)
    uint32_t htobe32(uint32_t value)
    uint64_t htobe64(uint64_t value)

cdef extern from "<pthread.h>" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    ctypedef struct pthread_cond_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, const void *attributes)
    int pthread_mutex_destroy(pthread_mutex_t *mutex)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_cond_init(pthread_cond_t *condition, const void *attributes)
    int pthread_cond_destroy(pthread_cond_t *condition)
    int pthread_cond_wait(pthread_cond_t *condition, pthread_mutex_t *mutex)
    int pthread_cond_broadcast(pthread_cond_t *condition)

cdef extern from *:
    """
    static inline int load_number(const int *number) { return __atomic_load_n(number, __ATOMIC_RELAXED); }
    static inline void store_number(int *number, int value) { __atomic_store_n(number, value, __ATOMIC_RELAXED); }
    """
    int load_number(const int *number) nogil
    void store_number(int *number, int value) nogil

__all__ = ["ABI", "PIECE_BYTES", "SPANS_MAX", "Copies", "CopyStream"]

ABI = 14  # of `nbdtarget.fast.compiled`

cdef enum:
    SLOTS_MAX = 16  # buffers of a thread
    SPANS_NR = 1 << 16  # as in nbdtarget_protocol.completion
    SPANS_AT_FIRST = 64
    REASON_BYTES = 200
    REQUEST_BYTES = 28
    EXTENDED_REQUEST_BYTES = 32
    CHUNK_BYTES = 20
    EXTENDED_CHUNK_BYTES = 32
    SIMPLE_BYTES = 16
    GIVING_WAY_BYTES = 64 << 10
    ERROR_CHUNK_MAX = 4358  # 6, and a string of 4096, and 256 for fields yet unknown
    FLAG_DONE = 1
    TYPE_NONE = 0
    TYPE_OFFSET_DATA = 1
    TYPE_OFFSET_HOLE = 2
    TYPE_ERROR_OFFSET = 32770
    TYPE_FLAG_ERROR = 32768

PIECE_BYTES = GIVING_WAY_BYTES  # of a system call, while the copies give way
SPANS_MAX = SPANS_NR  # pieces of the reply to a chunk that lie apart

cdef uint32_t REQUEST_MAGIC = 0x25609513U
cdef uint32_t EXTENDED_REQUEST_MAGIC = 0x21E41C71U
cdef uint32_t SIMPLE_MAGIC = 0x67446698U
cdef uint32_t CHUNK_MAGIC = 0x668E33EFU
cdef uint32_t EXTENDED_CHUNK_MAGIC = 0x6E8A278CU

cdef struct Copy:
    Copy *next  # in the queue, or among those that have ended
    int64_t number
    uint64_t at  # what has not begun: up to `end`
    uint64_t end
    int nr_under_way
    bint is_over  # cancelled or failed
    bint is_queued
    # The first failure: an errno, of which side, where, and which stream has failed to read.
    int status
    bint is_read
    uint64_t failed_at
    uint32_t failed_length
    int stream

cdef struct Shared:
    pthread_mutex_t lock
    pthread_cond_t changed  # there may be something to do, or nothing more to come
    pthread_mutex_t writing
    Copy *first
    Copy *last
    Copy *ended
    bint is_closed
    int fd
    int event_fd
    uint32_t chunk_bytes
    int nr_in_flight  # chunks, of all streams
    int nr_in_flight_max  # 0: the copies do not give way
    uint32_t small_chunk_bytes  # while they give way

cdef struct Slot:
    # A chunk under way, if `copy` is there.
    Copy *copy
    uint64_t cookie
    uint64_t offset
    uint32_t length
    uint32_t covered
    int status
    int nr_spans
    int nr_spans_max  # that there is memory for
    uint32_t *spans  # begin, end, begin, end, ...: what has come, in order
    uint8_t *data

cdef struct Stream:
    const Shared *shared  # while it works
    int number
    int sock  # or the file that is read
    bint is_file
    bint is_structured
    bint is_extended
    int nr_slots
    int nr_in_flight
    uint64_t cookie
    int error  # the errno of what has failed
    bint has_hung_up
    char reason[200]  # REASON_BYTES; what rule was broken
    Slot slots[16]  # SLOTS_MAX
    uint8_t text[4358]  # ERROR_CHUNK_MAX


# ---- the queue; under its lock ----

cdef void append(Shared *shared, Copy *copy) noexcept nogil:
    copy.next = NULL
    copy.is_queued = True
    if shared.last == NULL:
        shared.first = copy
    else:
        shared.last.next = copy
    shared.last = copy


cdef void unlink(Shared *shared, Copy *copy) noexcept nogil:
    """Take a copy out of the queue, if it is there."""
    cdef Copy *before = NULL
    cdef Copy *each = shared.first
    if not copy.is_queued:
        return
    while each != copy:
        before = each
        each = each.next
    if before == NULL:
        shared.first = copy.next
    else:
        before.next = copy.next
    if shared.last == copy:
        shared.last = before
    copy.is_queued = False
    copy.next = NULL


cdef bint maybe_end(Shared *shared, Copy *copy) noexcept nogil:
    """Whether nothing of this copy is under way or left. Then the loop has to be told, by `wake_loop`."""
    if copy.nr_under_way or copy.at < copy.end:
        return False
    unlink(shared, copy)
    copy.next = shared.ended
    shared.ended = copy
    return True


cdef void wake_loop(Shared *shared) noexcept nogil:
    """Tell the loop that copies have ended.

    Not under the lock: the loop takes it next, and may take the processor from the thread that has it.
    """
    cdef uint64_t one = 1
    # It never blocks: the counter is taken long before it is full.
    while sys_write(shared.event_fd, &one, sizeof(one)) < 0 and errno == EINTR:
        pass


cdef void stop_copy(Shared *shared, Copy *copy) noexcept nogil:
    """What has not begun of this copy is left out."""
    copy.is_over = True
    copy.at = copy.end
    unlink(shared, copy)


cdef void note_failure(
    Shared *shared, Copy *copy, int status, bint is_read, uint64_t offset, uint32_t length, int stream
) noexcept nogil:
    if not copy.status:
        copy.status = status
        copy.is_read = is_read
        copy.failed_at = offset
        copy.failed_length = length
        copy.stream = stream
    stop_copy(shared, copy)


cdef bint has_room(const Shared *shared) noexcept nogil:
    """Whether one more chunk may be under way."""
    return not shared.nr_in_flight_max or shared.nr_in_flight < shared.nr_in_flight_max


cdef void wake_if_closed(Shared *shared) noexcept nogil:
    """The queue may be empty now: threads that sleep, because the bound was reached, end."""
    if shared.is_closed and shared.first == NULL:
        pthread_cond_broadcast(&shared.changed)


cdef bint take_chunk(Shared *shared, Slot *slot) noexcept nogil:
    """Begin with the next chunk; False: there is none, or no room."""
    cdef Copy *copy = shared.first
    cdef uint64_t left
    cdef uint32_t bytes_max = shared.small_chunk_bytes if shared.nr_in_flight_max else shared.chunk_bytes
    if copy == NULL or not has_room(shared):
        return False
    left = copy.end - copy.at
    slot.copy = copy
    slot.offset = copy.at
    slot.length = bytes_max if left > bytes_max else <uint32_t>left
    slot.covered = 0
    slot.status = 0
    slot.nr_spans = 0
    copy.at += slot.length
    copy.nr_under_way += 1
    shared.nr_in_flight += 1
    if copy.at == copy.end:
        unlink(shared, copy)
    return True


cdef size_t piece_of(const Shared *shared, size_t length) noexcept nogil:
    """Return how many of these bytes one system call moves. Not under the lock."""
    if length > GIVING_WAY_BYTES and load_number(&shared.nr_in_flight_max):
        return GIVING_WAY_BYTES
    return length


# ---- the wire ----

cdef bint receive(Stream *stream, uint8_t *into, size_t length) noexcept nogil:
    """Receive all of it; False: the stream is broken."""
    cdef ssize_t got
    while length:
        got = recv(stream.sock, into, piece_of(stream.shared, length), MSG_WAITALL)
        if got > 0:
            into += got
            length -= <size_t>got
        elif not got:
            stream.has_hung_up = True
            return False
        elif errno != EINTR:
            stream.error = errno
            return False
    return True


cdef bint ask(Stream *stream, Slot **slots, int nr) noexcept nogil:
    """Ask for chunks; False: the stream is broken."""
    cdef uint8_t requests[16 * 32]  # SLOTS_MAX * EXTENDED_REQUEST_BYTES
    cdef uint8_t *at = requests
    cdef const uint8_t *begin = requests
    cdef size_t size = EXTENDED_REQUEST_BYTES if stream.is_extended else REQUEST_BYTES
    cdef uint32_t magic = htobe32(EXTENDED_REQUEST_MAGIC if stream.is_extended else REQUEST_MAGIC)
    cdef uint32_t length
    cdef uint64_t number
    cdef ssize_t sent
    cdef int each
    for each in range(nr):
        stream.cookie += 1
        slots[each].cookie = stream.cookie
        memset(at, 0, size)  # no flags, and READ
        memcpy(at, &magic, 4)
        number = htobe64(stream.cookie)
        memcpy(at + 8, &number, 8)
        number = htobe64(slots[each].offset)
        memcpy(at + 16, &number, 8)
        if stream.is_extended:
            number = htobe64(slots[each].length)
            memcpy(at + 24, &number, 8)
        else:
            length = htobe32(slots[each].length)
            memcpy(at + 24, &length, 4)
        at += size
    while begin < at:
        sent = send(stream.sock, begin, at - begin, MSG_NOSIGNAL)
        if sent >= 0:
            begin += sent
        elif errno != EINTR:
            stream.error = errno
            return False
    return True


cdef Slot *find(Stream *stream, uint64_t cookie) noexcept nogil:
    cdef int nr
    for nr in range(stream.nr_slots):
        if stream.slots[nr].copy != NULL and stream.slots[nr].cookie == cookie:
            return &stream.slots[nr]
    snprintf(stream.reason, REASON_BYTES, "reply with unknown cookie 0x%llx", <unsigned long long>cookie)
    return NULL


cdef int first_behind(const Slot *slot, uint32_t begin) noexcept nogil:
    """Return the number of the first span that ends behind `begin`."""
    cdef int low = 0, high = slot.nr_spans, middle
    while low < high:
        middle = (low + high) // 2
        if slot.spans[2 * middle + 1] <= begin:
            low = middle + 1
        else:
            high = middle
    return low


cdef bint make_room(Stream *stream, Slot *slot) noexcept nogil:
    """Have memory for one more span; False: there is none, or it would be too many."""
    cdef int nr = 2 * slot.nr_spans_max if slot.nr_spans_max else SPANS_AT_FIRST
    cdef uint32_t *spans
    if slot.nr_spans < slot.nr_spans_max:
        return True
    if slot.nr_spans == SPANS_NR:
        snprintf(stream.reason, REASON_BYTES, "too many scattered chunks in reply to a READ of %llu+%u",
                 <unsigned long long>slot.offset, slot.length)
        return False
    spans = <uint32_t *>realloc(slot.spans, <size_t>nr * 2 * sizeof(uint32_t))
    if spans == NULL:
        stream.error = ENOMEM
        return False
    slot.spans = spans
    slot.nr_spans_max = nr
    return True


cdef bint cover(Stream *stream, Slot *slot, uint64_t offset, uint64_t length, uint32_t *begin) noexcept nogil:
    """Note that content came for a range; `begin` is where it lies in the buffer. False: it may not come."""
    cdef uint32_t *spans = slot.spans
    cdef uint32_t first, end
    cdef int at, nr = slot.nr_spans
    if offset < slot.offset or length > slot.length or offset - slot.offset > slot.length - length:
        snprintf(
            stream.reason, REASON_BYTES, "chunk %llu+%llu outside of a READ of %llu+%u", <unsigned long long>offset,
            <unsigned long long>length, <unsigned long long>slot.offset, slot.length,
        )
        return False
    first = <uint32_t>(offset - slot.offset)
    end = first + <uint32_t>length
    begin[0] = first
    slot.covered += <uint32_t>length
    at = first_behind(slot, first)
    if at < nr and spans[2 * at] < end:
        snprintf(stream.reason, REASON_BYTES, "overlapping chunks in reply to a READ of %llu+%u",
                 <unsigned long long>slot.offset, slot.length)
        return False
    if at and spans[2 * at - 1] == first:
        spans[2 * at - 1] = end
        if at < nr and spans[2 * at] == end:  # it has closed the gap
            spans[2 * at - 1] = spans[2 * at + 1]
            memmove(spans + 2 * at, spans + 2 * at + 2, (nr - at - 1) * 8)
            slot.nr_spans -= 1
    elif at < nr and spans[2 * at] == end:
        spans[2 * at] = first
    else:
        if not make_room(stream, slot):
            return False
        spans = slot.spans
        memmove(spans + 2 * at + 2, spans + 2 * at, (nr - at) * 8)
        spans[2 * at] = first
        spans[2 * at + 1] = end
        slot.nr_spans += 1
    return True


cdef void set_status(Slot *slot, uint32_t error) noexcept nogil:
    if slot.status:
        return  # the first one is the cause
    # EPERM, EIO, ENOMEM, EINVAL, ENOSPC, EOVERFLOW, ENOTSUP, ESHUTDOWN
    if error == 1 or error == 5 or error == 12 or error == 22 or error == 28 or error == 75 or error == 95 or error == 108:
        slot.status = <int>error
    else:
        slot.status = EINVAL  # proto.md: so counts what a client does not expect


cdef bint receive_error(Stream *stream, Slot *slot, uint16_t kind, uint64_t length) noexcept nogil:
    """Receive the payload of an error chunk; False: the stream is broken."""
    cdef uint64_t tail = 8 if kind == TYPE_ERROR_OFFSET else 0
    cdef uint32_t error
    cdef uint16_t text_length
    cdef uint64_t offset
    if length < 6 + tail or length > ERROR_CHUNK_MAX:
        snprintf(stream.reason, REASON_BYTES, "error chunk of %llu bytes", <unsigned long long>length)
        return False
    if not receive(stream, stream.text, length):
        return False
    memcpy(&error, stream.text, 4)
    memcpy(&text_length, stream.text + 4, 2)
    error = be32toh(error)
    text_length = be16toh(text_length)
    if not error:
        snprintf(stream.reason, REASON_BYTES, "error chunk with error 0")
        return False
    if text_length > length - 6 - tail:
        snprintf(stream.reason, REASON_BYTES, "error message is longer than its chunk")
        return False
    if tail:
        memcpy(&offset, stream.text + 6 + text_length, 8)
        offset = be64toh(offset)
        if offset < slot.offset or offset - slot.offset >= slot.length:
            snprintf(stream.reason, REASON_BYTES, "error at %llu, outside of a READ of %llu+%u",
                     <unsigned long long>offset, <unsigned long long>slot.offset, slot.length)
            return False
    set_status(slot, error)
    return True


cdef bint receive_content(Stream *stream, Slot *slot, uint16_t kind, uint64_t length) noexcept nogil:
    """Receive the payload of a chunk with data, or of a hole; False: the stream is broken."""
    cdef uint64_t offset, size = length - 8
    cdef uint32_t begin = 0, hole
    cdef uint8_t place[12]
    if kind == TYPE_OFFSET_HOLE:
        if length != 12:
            snprintf(stream.reason, REASON_BYTES, "OFFSET_HOLE chunk of %llu bytes", <unsigned long long>length)
            return False
    elif length < 9:
        snprintf(stream.reason, REASON_BYTES, "OFFSET_DATA chunk of %llu bytes", <unsigned long long>length)
        return False
    if not receive(stream, place, 12 if kind == TYPE_OFFSET_HOLE else 8):
        return False
    memcpy(&offset, place, 8)
    if kind == TYPE_OFFSET_HOLE:
        memcpy(&hole, place + 8, 4)
        size = be32toh(hole)
        if not size:
            snprintf(stream.reason, REASON_BYTES, "OFFSET_HOLE chunk of no bytes")
            return False
    if not cover(stream, slot, be64toh(offset), size, &begin):
        return False
    if kind == TYPE_OFFSET_HOLE:
        memset(slot.data + begin, 0, size)
        return True
    return receive(stream, slot.data + begin, size)


cdef Slot *receive_reply(Stream *stream) noexcept nogil:
    """Receive until a reply is complete, and return its chunk; NULL: the stream is broken."""
    cdef uint8_t head[32]  # EXTENDED_CHUNK_BYTES
    cdef size_t head_length = EXTENDED_CHUNK_BYTES if stream.is_extended else CHUNK_BYTES
    cdef uint32_t chunk_magic = EXTENDED_CHUNK_MAGIC if stream.is_extended else CHUNK_MAGIC
    cdef uint32_t magic, number
    cdef uint16_t flags, kind
    cdef uint64_t cookie, length, offset
    cdef bint has_chunks = stream.is_structured or stream.is_extended
    cdef Slot *slot
    while True:
        if not receive(stream, head, SIMPLE_BYTES):
            return NULL
        memcpy(&magic, head, 4)
        memcpy(&cookie, head + 8, 8)
        magic = be32toh(magic)
        cookie = be64toh(cookie)
        if magic == SIMPLE_MAGIC and not stream.is_extended:
            slot = find(stream, cookie)
            if slot == NULL:
                return NULL
            if has_chunks:
                snprintf(stream.reason, REASON_BYTES, "simple reply to a READ of %llu+%u",
                         <unsigned long long>slot.offset, slot.length)
                return NULL
            memcpy(&number, head + 4, 4)
            if number:
                set_status(slot, be32toh(number))
            elif not receive(stream, slot.data, slot.length):
                return NULL
            return slot
        if magic != chunk_magic or not has_chunks:
            snprintf(stream.reason, REASON_BYTES, "bad reply magic 0x%x", magic)
            return NULL
        if not receive(stream, head + SIMPLE_BYTES, head_length - SIMPLE_BYTES):
            return NULL
        slot = find(stream, cookie)
        if slot == NULL:
            return NULL
        memcpy(&flags, head + 4, 2)
        memcpy(&kind, head + 6, 2)
        flags = be16toh(flags)
        kind = be16toh(kind)
        if stream.is_extended:
            memcpy(&offset, head + 16, 8)
            memcpy(&length, head + 24, 8)
            length = be64toh(length)
            if be64toh(offset) != slot.offset:
                snprintf(stream.reason, REASON_BYTES, "chunk for offset %llu in reply to a READ of %llu+%u",
                         <unsigned long long>be64toh(offset), <unsigned long long>slot.offset, slot.length)
                return NULL
        else:
            memcpy(&number, head + 16, 4)
            length = be32toh(number)
        if kind == TYPE_OFFSET_DATA or kind == TYPE_OFFSET_HOLE:
            if not receive_content(stream, slot, kind, length):
                return NULL
        elif kind == TYPE_NONE:
            if length or not flags & FLAG_DONE:
                snprintf(stream.reason, REASON_BYTES, "NONE chunk with a payload, or without DONE")
                return NULL
        elif kind & TYPE_FLAG_ERROR:
            if not receive_error(stream, slot, kind, length):
                return NULL
        else:
            snprintf(stream.reason, REASON_BYTES, "unknown chunk type %u", <unsigned>kind)
            return NULL
        if flags & FLAG_DONE:
            if not slot.status and slot.covered != slot.length:
                snprintf(stream.reason, REASON_BYTES, "only %u bytes in reply to a READ of %llu+%u",
                         slot.covered, <unsigned long long>slot.offset, slot.length)
                return NULL
            return slot


# ---- a thread ----

cdef Slot *read_chunk(Stream *stream) noexcept nogil:
    """Read the chunk that is under way from the file, and return it."""
    cdef Slot *slot = &stream.slots[0]  # it has one buffer
    cdef uint32_t got = 0
    cdef ssize_t more
    while got < slot.length:
        more = pread(stream.sock, slot.data + got, piece_of(stream.shared, slot.length - got), <off_t>(slot.offset + got))
        if more > 0:
            got += <uint32_t>more
        elif not more:
            slot.status = EIO  # the file has been truncated
            break
        elif errno != EINTR:
            slot.status = errno
            break
    return slot



cdef int write_all(Shared *shared, const Slot *slot) noexcept nogil:
    """Write a chunk; return 0 or an errno."""
    # In one piece, unlike what clients write (`pieces.py`): the large folios that this makes are dropped soon.
    cdef uint32_t put = 0
    cdef ssize_t more
    cdef int status = 0
    pthread_mutex_lock(&shared.writing)
    while put < slot.length:
        more = pwrite(shared.fd, slot.data + put, piece_of(shared, slot.length - put), <off_t>(slot.offset + put))
        if more > 0:
            put += <uint32_t>more
        elif not more:
            status = EIO
            break
        elif errno != EINTR:
            status = errno
            break
    pthread_mutex_unlock(&shared.writing)
    return status


cdef void end_chunk(Shared *shared, Stream *stream, Slot *slot, int status, bint is_read) noexcept nogil:
    """Args: status: 0, or what the chunk has failed with, when it was read or written."""
    cdef Copy *copy = slot.copy
    cdef bint has_ended
    pthread_mutex_lock(&shared.lock)
    if status:
        note_failure(shared, copy, status, is_read, slot.offset, slot.length, stream.number if is_read else -1)
    slot.copy = NULL
    store_number(&stream.nr_in_flight, load_number(&stream.nr_in_flight) - 1)
    copy.nr_under_way -= 1
    shared.nr_in_flight -= 1
    has_ended = maybe_end(shared, copy)
    wake_if_closed(shared)  # a failure may have emptied the queue
    pthread_mutex_unlock(&shared.lock)
    if has_ended:
        wake_loop(shared)


cdef bint is_over(Shared *shared, const Copy *copy) noexcept nogil:
    cdef bint answer
    pthread_mutex_lock(&shared.lock)
    answer = copy.is_over
    pthread_mutex_unlock(&shared.lock)
    return answer


cdef int take_chunks(Shared *shared, Stream *stream, Slot **taken) noexcept nogil:
    """Begin with chunks, as many as there are buffers; wait for one, if none is under way. 0: there is none, or this is the end."""
    cdef int nr, nr_taken = 0
    pthread_mutex_lock(&shared.lock)
    while not stream.nr_in_flight and (not has_room(shared) if shared.first != NULL else not shared.is_closed):
        pthread_cond_wait(&shared.changed, &shared.lock)
    for nr in range(stream.nr_slots):
        if stream.slots[nr].copy == NULL:
            if not take_chunk(shared, &stream.slots[nr]):
                break
            taken[nr_taken] = &stream.slots[nr]
            nr_taken += 1
    store_number(&stream.nr_in_flight, stream.nr_in_flight + nr_taken)
    wake_if_closed(shared)
    pthread_mutex_unlock(&shared.lock)
    return nr_taken


cdef bint work_on(Shared *shared, Stream *stream) noexcept nogil:
    """Copy chunks until the copies are closed; False: the stream is broken, and its chunks are still there."""
    cdef Slot *taken[16]  # SLOTS_MAX
    cdef Slot *slot
    cdef int nr, status
    while True:
        nr = take_chunks(shared, stream, taken)
        if nr and not stream.is_file:
            if not ask(stream, taken, nr):
                return False
        elif not stream.nr_in_flight:
            return True
        slot = read_chunk(stream) if stream.is_file else receive_reply(stream)
        if slot == NULL:
            return False
        if slot.status:
            end_chunk(shared, stream, slot, slot.status, True)
            continue
        status = 0 if is_over(shared, slot.copy) else write_all(shared, slot)
        end_chunk(shared, stream, slot, status, False)


cdef class CopyStream:
    """A connection to an NBD server on which nothing is in flight.

    Args:
        sock: its descriptor, which blocks, and stays the caller's. It is not closed before `Copies.work` has returned.
        is_structured, is_extended: what was negotiated.

    Attributes:
        nr_in_flight: READs whose chunks have not ended. Context: any thread.
    """

    cdef Stream *stream

    def __cinit__(self, int sock, bint is_structured, bint is_extended):
        self.stream = <Stream *>calloc(1, sizeof(Stream))
        if self.stream == NULL:
            raise MemoryError
        self.stream.sock = sock
        self.stream.is_structured = is_structured
        self.stream.is_extended = is_extended

    @staticmethod
    def of_file(int fd):
        """Return a stream that reads a file, which stays the caller's. It never breaks, and has one buffer: its reads block."""
        cdef CopyStream made = CopyStream(fd, False, False)
        made.stream.is_file = True
        return made

    def __dealloc__(self):
        free(self.stream)

    @property
    def nr_in_flight(self):
        return load_number(&self.stream.nr_in_flight)


cdef class Copies:
    """Copies into one file; see the module head.

    Args:
        fd: of the file; stays the caller's, and is not closed before each copy has ended.
        chunk_bytes: of one READ and one write.

    Attributes:
        event_fd: readable when copies have ended.

    Raises: OSError, MemoryError: no eventfd, no memory.
    """

    cdef Shared *shared

    def __cinit__(self, int fd, uint32_t chunk_bytes):
        if not chunk_bytes:
            raise ValueError("a chunk has no bytes")
        self.shared = <Shared *>calloc(1, sizeof(Shared))
        if self.shared == NULL:
            raise MemoryError
        pthread_mutex_init(&self.shared.lock, NULL)
        pthread_mutex_init(&self.shared.writing, NULL)
        pthread_cond_init(&self.shared.changed, NULL)
        self.shared.fd = fd
        self.shared.chunk_bytes = chunk_bytes
        self.shared.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.shared.event_fd < 0:
            raise OSError(errno, os.strerror(errno))

    def __dealloc__(self):
        # No thread is in `work`, for it would keep this object.
        cdef Copy *copy
        if self.shared == NULL:
            return
        while self.shared.first != NULL:
            copy = self.shared.first
            unlink(self.shared, copy)
            free(copy)
        while self.shared.ended != NULL:
            copy = self.shared.ended
            self.shared.ended = copy.next
            free(copy)
        if self.shared.event_fd >= 0:
            close(self.shared.event_fd)
        pthread_mutex_destroy(&self.shared.lock)
        pthread_mutex_destroy(&self.shared.writing)
        pthread_cond_destroy(&self.shared.changed)
        free(self.shared)

    @property
    def event_fd(self):
        return self.shared.event_fd

    def put(self, int64_t number, uint64_t offset, uint64_t length):
        """Copy a range, which is not empty; `take_ended` tells its end. Raises: MemoryError: nothing was begun."""
        cdef Copy *copy
        if not length or offset + length < offset:
            raise ValueError("this is no range")
        copy = <Copy *>calloc(1, sizeof(Copy))
        if copy == NULL:
            raise MemoryError
        copy.number = number
        copy.at = offset
        copy.end = offset + length
        copy.stream = -1
        pthread_mutex_lock(&self.shared.lock)
        append(self.shared, copy)
        pthread_cond_broadcast(&self.shared.changed)
        pthread_mutex_unlock(&self.shared.lock)

    def leave_out(self, int64_t number, int status=0, int stream=-1):
        """What has not begun of a copy is not to be copied. Nothing happens if no part of it is in the queue.

        Args: status, stream: it counts as failed with this errno, because this stream could not read.
        """
        cdef Copy *copy
        pthread_mutex_lock(&self.shared.lock)
        copy = self.shared.first
        while copy != NULL and copy.number != number:
            copy = copy.next
        if copy != NULL:
            self._leave_out(copy, status, stream)
            wake_if_closed(self.shared)
        pthread_mutex_unlock(&self.shared.lock)
        wake_loop(self.shared)

    def fail_queued(self, int status, int stream):
        """No stream is left: what has not begun fails with this errno, because this stream, the last one, could not read."""
        pthread_mutex_lock(&self.shared.lock)
        while self.shared.first != NULL:
            self._leave_out(self.shared.first, status, stream)
        wake_if_closed(self.shared)
        pthread_mutex_unlock(&self.shared.lock)
        wake_loop(self.shared)

    cdef void _leave_out(self, Copy *copy, int status, int stream) noexcept nogil:
        cdef uint64_t left = copy.end - copy.at
        if left > self.shared.chunk_bytes:
            left = self.shared.chunk_bytes
        if status:
            note_failure(self.shared, copy, status, True, copy.at, <uint32_t>left, stream)
        else:
            stop_copy(self.shared, copy)
        maybe_end(self.shared, copy)

    def take_ended(self):
        """Return the copies that have ended since the last call, the first one first.

        Each is a tuple of its number, 0 or the errno of its first failure, whether that was in reading, the offset and length of the chunk, and
        the number of the stream that could not read, or -1.
        """
        cdef list ended = []
        cdef Copy *copy
        cdef Copy *following
        cdef char count[8]
        sys_read(self.shared.event_fd, count, 8)
        pthread_mutex_lock(&self.shared.lock)
        copy = self.shared.ended
        self.shared.ended = NULL
        pthread_mutex_unlock(&self.shared.lock)
        while copy != NULL:
            following = copy.next
            ended.append((copy.number, copy.status, bool(copy.is_read), copy.failed_at, copy.failed_length, copy.stream))
            free(copy)
            copy = following
        ended.reverse()
        return ended

    def give_way(self, int nr_chunks_max, uint32_t chunk_bytes):
        """From the next chunks on, `nr_chunks_max` of them are under way at most, of `chunk_bytes` at most; see *Giving way* above.

        Args: nr_chunks_max: 0: the copies do not give way any more. chunk_bytes: not more than `Copies` was made with.
        """
        if nr_chunks_max < 0 or nr_chunks_max and not 0 < chunk_bytes <= self.shared.chunk_bytes:
            raise ValueError("such chunks there cannot be")
        pthread_mutex_lock(&self.shared.lock)
        self.shared.small_chunk_bytes = chunk_bytes
        store_number(&self.shared.nr_in_flight_max, nr_chunks_max)
        pthread_cond_broadcast(&self.shared.changed)
        pthread_mutex_unlock(&self.shared.lock)

    def close(self):
        """Nothing more is put: threads end when the queue is empty. Idempotent."""
        pthread_mutex_lock(&self.shared.lock)
        self.shared.is_closed = True
        pthread_cond_broadcast(&self.shared.changed)
        pthread_mutex_unlock(&self.shared.lock)

    def work(self, CopyStream stream not None, int number, int nr_buffers):
        """Copy chunks until the copies are closed, or the stream breaks. Context: a thread of its own, once for each stream.

        If the stream has broken, its chunks are under way until `fail_chunks`.

        Args:
            number: stands for the stream in what `take_ended` returns.
            nr_buffers: so many chunks are asked for at once.

        Returns what has broken the stream: an errno, or a sentence about the rule of the protocol that the server has broken; ("", 0): nothing;
            an empty sentence and errno -1: the server has hung up.
        Raises: MemoryError.
        """
        cdef Stream *it = stream.stream
        cdef bint is_whole
        cdef int nr
        if not 0 < nr_buffers <= SLOTS_MAX:
            raise ValueError("so many buffers there cannot be")
        if it.is_file:
            nr_buffers = 1
        it.shared = self.shared
        it.number = number
        it.nr_slots = nr_buffers
        try:
            for nr in range(nr_buffers):
                it.slots[nr].data = <uint8_t *>PyMem_RawMalloc(self.shared.chunk_bytes)
                if it.slots[nr].data == NULL:
                    raise MemoryError
            with nogil:
                is_whole = work_on(self.shared, it)
        finally:
            for nr in range(nr_buffers):
                PyMem_RawFree(it.slots[nr].data)
                it.slots[nr].data = NULL
                free(it.slots[nr].spans)
                it.slots[nr].spans = NULL
                it.slots[nr].nr_spans = it.slots[nr].nr_spans_max = 0
        if is_whole:
            return "", 0
        if it.has_hung_up:
            return "", -1
        return (<bytes>it.reason).decode("ascii"), it.error

    def fail_chunks(self, CopyStream stream not None, int status):
        """The stream has broken: what it has under way has failed with this errno."""
        cdef Stream *it = stream.stream
        cdef int nr
        for nr in range(it.nr_slots):
            if it.slots[nr].copy != NULL:
                end_chunk(self.shared, it, &it.slots[nr], status, True)
        # This stream's thread looks for no further chunk: others do, who have slept because of the bound.
        pthread_mutex_lock(&self.shared.lock)
        pthread_cond_broadcast(&self.shared.changed)
        pthread_mutex_unlock(&self.shared.lock)
