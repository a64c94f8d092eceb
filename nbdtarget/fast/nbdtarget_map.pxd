# SPDX-License-Identifier: Apache-2.0
"""The C side of `nbdtarget_map`, for `nbdtarget_fast`: places in files that the kernel may send from."""

from libc.stdint cimport int64_t, uint8_t, uint64_t

from nbdtarget_tls cimport iovec

cdef struct Window:
    uint8_t *base  # NULL: it is free
    uint64_t owner
    uint64_t number  # it begins at `number * window_bytes` of the file
    uint64_t used  # the clock when it was used last

cdef struct WindowTable:
    # Fields of `Windows`.
    Window *windows
    uint64_t nr_sets
    uint64_t window_bytes
    uint64_t page_bytes
    uint64_t clock  # counts the bytes that READs wanted from windows
    uint64_t swept  # the clock at the last sweep
    uint64_t evicted  # the clock when a window last made room for another one
    uint64_t nr_made
    uint64_t nr_mapped
    uint64_t nr_sent
    bint is_sweep_wanted

cdef struct Mapping:
    # What a file has to do with windows.
    WindowTable *table  # NULL: it has none
    uint64_t owner  # a number of its own
    uint64_t length_min  # a shorter READ is copied
    unsigned skip  # so many READs are copied
    unsigned penalty

cdef class Windows:
    cdef WindowTable table
    cdef uint64_t _length_min
    cdef object sweep_wanted
    cdef bint _drop(self, uint64_t owner, bint is_all, uint64_t nr_max) noexcept

cdef void map_begin(WindowTable *table, uint64_t length) noexcept nogil
cdef bint map_skips(Mapping *mapping) noexcept nogil
cdef void map_sent(Mapping *mapping, int64_t taken_ns) noexcept nogil
cdef int map_place(Mapping *mapping, int fd, uint64_t at, uint64_t length, iovec *places, int nr_places, int places_max) noexcept nogil
