# SPDX-License-Identifier: Apache-2.0
"""The C side of `nbdtarget_sync`, for `nbdtarget_fast`: a sync without a Python object, and without the interpreter's lock."""

from libc.stdint cimport int64_t, uint8_t

ctypedef int64_t (*sync_next)(void *context, ssize_t nr_sent, char *answer) noexcept nogil

cdef extern from *:
    """
    #include <pthread.h>
    #include <semaphore.h>
    typedef struct sync_job sync_job; /* of which only `nbdtarget_sync` knows the fields */
    """
    ctypedef struct sem_t:
        pass
    ctypedef struct pthread_t:
        pass
    ctypedef struct sync_range:
        int64_t begin
        int64_t end
    ctypedef struct sync_job:
        int status
        int fd
        int event_fd
        int is_closed
        int nice_step
        int sock
        size_t answer_length
        ssize_t nr_sent
        char answer[32]
        int64_t begun_ns
        sync_next next
        void *context
        int64_t fake_ns
        sync_range *ranges
        size_t nr_begun
        size_t nr_ranges
        sem_t asked
        pthread_t thread

cdef class Syncer:
    cdef sync_job *job
    cdef bint is_started
    cdef int _prepare(self) except -1
    cdef int _ask(self) except -1

cdef void sync_begin(
    sync_job *job, int sock, const uint8_t *answer, size_t length, sync_next following, void *context
) noexcept nogil
cdef int sync_end(sync_job *job, int64_t wait_ns, ssize_t *sent) noexcept nogil
