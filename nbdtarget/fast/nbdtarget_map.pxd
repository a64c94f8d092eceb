# SPDX-License-Identifier: Apache-2.0
"""The C side of `nbdtarget_map`, for `nbdtarget_fast`: places in files that the kernel may send from."""

from libc.stdint cimport uint8_t, uint64_t

from nbdtarget_tls cimport iovec

cdef struct Window:
    uint8_t *base  # NULL: it is free
    uint64_t owner
    uint64_t number  # it begins at `number * window_bytes` of the file
    uint64_t used  # the turn of the clock in which it was used last

cdef struct WindowTable:
    # Fields of `Windows`.
    Window *windows
    uint64_t nr_sets
    uint64_t window_bytes
    uint64_t page_bytes
    uint64_t clock  # counts the requests
    uint64_t swept  # the clock at the last sweep
    uint64_t nr_mapped
    uint64_t nr_sent
    bint is_sweep_wanted

cdef struct Mapping:
    # What a file has to do with windows.
    WindowTable *table  # NULL: it has none
    uint64_t owner  # a number of its own
    uint64_t length_min  # a shorter READ is copied

cdef class Windows:
    cdef WindowTable table
    cdef uint64_t _length_min
    cdef object sweep_wanted
    cdef bint _drop(self, uint64_t owner, bint is_all, uint64_t nr_max) noexcept

cdef void map_begin(WindowTable *table) noexcept nogil
cdef int map_place(Mapping *mapping, int fd, uint64_t at, uint64_t length, iovec *places, int nr_places, int places_max) noexcept nogil
