# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""Windows: parts of files that are mapped into memory, so that the kernel sends from the page cache with one copy less.

Theory of operation. A READ that the page cache answers is copied twice: from the page cache into our buffer, and from there into the
socket. If the kernel is given a place in a mapping of the file instead of our buffer, it copies once. For a READ of 256 KiB that is a quarter of the
CPU time. For short ones it gains little, so `length_min` is the shortest that is sent this way.

*Only the kernel touches a mapping.* A page of a mapping may go away at any time: another program truncates the file, or the disk fails. Code of ours that
touched it would end the process (SIGBUS). A system call that copies from there stops with EFAULT, or comes short. So no code here or in
`nbdtarget_fast` reads a window; the addresses go to `mincore`, `sendmsg`, `madvise` and `munmap` alone. The bytes that are looked at for zeroes are read with pread.

*The loop rarely waits for the disk.* A page that is not in memory would be read from the disk in the middle of `sendmsg`. So `mincore` is asked first, for all pages of
a READ. If one is missing, the READ takes the usual way. A page can still be evicted in the microseconds between the two calls; then the
loop waits for that page. The first use of a page in a window waits for its lock, too, which the kernel may hold while it writes that page back. So each send that takes
more than SEND_SLOW_NS has twice as many of the next READs of that file copied as the one before it.
Of files that another machine or process has to be asked about, neither the page nor `mmap` itself may ever come back: `nbdtarget/devices/file/windows.py` gives no windows to them.
`mincore` tells the truth only of files that the process owns or may write to. For others it says that all pages are there, so
`takes` tries it on a page behind the end of the file, which is never there.

*What is bounded.* A file is mapped in windows of `window_bytes`, when a READ needs them. There are at most `bytes_max // window_bytes` of them for all files together;
the one that was not used for longest makes room for a new one. Giving one back and mapping another one takes longer than copying a short READ. So READs
have to want `window_bytes // EVICT_SHARE` bytes between one such change and the next; until then, a READ that finds no window is copied.
A mapped page needs 8 bytes of page table, and counts in the resident memory of the process (RssFile) though it is the
page cache that has it. `sweep` gives windows back that were not used since the sweep before it. Each window lies in one of a few places that its file and number
choose, so finding it needs no search.

*When a window goes.* A mapping keeps the open file alive, with its locks, even after close(2). So the device calls `drop` before it closes the file, and before it opens the
same file anew (pages that are mapped cannot be dropped from the page cache). All of it happens in the thread of the event loop, between two turns: no window goes while it is in use. Within a
READ of several windows, none of them makes room for another one. A file that grows, shrinks or is written to needs nothing: a shared mapping shows what the page cache has, as pread does.

Helpers that are forked do not inherit windows (MADV_DONTFORK). On 32-bit machines there is no room in the address space, and no file is taken.
"""

import os

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t, uint64_t
from libc.stdlib cimport calloc, free
from libc.string cimport memchr

from nbdtarget_tls cimport iovec

cdef extern from "<sys/mman.h>" nogil:
    int PROT_READ
    int MAP_SHARED
    int MADV_DONTFORK
    void *MAP_FAILED
    void *mmap(void *at, size_t length, int protection, int flags, int fd, int64_t offset)
    int munmap(void *at, size_t length)
    int madvise(void *at, size_t length, int advice)
    int mincore(void *at, size_t length, unsigned char *pages)

cdef extern from "<unistd.h>" nogil:
    int _SC_PAGESIZE
    long sysconf(int name)

__all__ = ["ABI", "LENGTH_MIN", "WINDOW_BYTES", "Windows"]

ABI = 14  # of `nbdtarget.fast.compiled`

cdef enum:
    WAYS = 4  # windows that compete for the same places
    PAGES_MAX = 512  # that one question to mincore is about
    EVICT_SHARE = 2  # see the module head
    # A send from windows that takes so long has waited for something. Each time that it does, twice as many READs are copied.
    SEND_SLOW_NS = 1000000
    MAP_SKIP_MAX = 1024

# Giving a window of this size back takes 90 us if all of it is mapped: the loop can spare that.
WINDOW_BYTES = 16 << 20
LENGTH_MIN = 64 << 10  # 1.16 times the throughput there, 1.09 at half of it (a socket pair, 8 READs at a time)

cdef uint64_t nr_owners = 0


cdef inline void map_begin(WindowTable *table, uint64_t length) noexcept nogil:
    """A READ begins: no window that it uses makes room for another one of it.

    Args: length: at least 1.
    """
    table.clock += length


cdef inline bint map_skips(Mapping *mapping) noexcept nogil:
    """Whether this READ of the file is to be copied, because one before it took too long."""
    if not mapping.skip:
        return False
    mapping.skip -= 1
    return True


cdef inline void skip_more(Mapping *mapping) noexcept nogil:
    mapping.penalty = min(2 * mapping.penalty + 1, <unsigned>MAP_SKIP_MAX)
    mapping.skip = mapping.penalty


cdef inline void map_sent(Mapping *mapping, int64_t taken_ns) noexcept nogil:
    """A READ of the file was sent from windows, which took so long."""
    if taken_ns > SEND_SLOW_NS:
        skip_more(mapping)
    else:
        mapping.penalty //= 2


cdef inline void unmap(WindowTable *table, Window *window) noexcept nogil:
    munmap(window.base, table.window_bytes)
    window.base = NULL
    table.nr_mapped -= 1


cdef uint8_t *find_window(Mapping *mapping, int fd, uint64_t number) noexcept nogil:
    """Return where a window of the file is mapped; NULL: it is not, and cannot be now."""
    cdef WindowTable *table = mapping.table
    # The windows of one file lie in sets that follow each other.
    cdef Window *window = &table.windows[(mapping.owner * 7 + number) % table.nr_sets * WAYS]
    cdef Window *oldest = window
    cdef int nr
    cdef void *base
    for nr in range(WAYS):
        if window[nr].base != NULL and window[nr].owner == mapping.owner and window[nr].number == number:
            window[nr].used = table.clock
            return window[nr].base
        if window[nr].base == NULL or oldest.base != NULL and window[nr].used < oldest.used:
            oldest = &window[nr]
    if oldest.base != NULL:
        if oldest.used == table.clock:
            return NULL  # the READ itself uses it
        if table.clock - table.evicted < table.window_bytes // EVICT_SHARE:
            return NULL  # more is in use than there are windows
        table.evicted = table.clock
        unmap(table, oldest)
    base = mmap(NULL, table.window_bytes, PROT_READ, MAP_SHARED, fd, <int64_t>(number * table.window_bytes))
    if base == MAP_FAILED:
        skip_more(mapping)  # there may be memory for it later
        return NULL
    madvise(base, table.window_bytes, MADV_DONTFORK)
    oldest.base, oldest.owner, oldest.number, oldest.used = <uint8_t *>base, mapping.owner, number, table.clock
    table.nr_mapped += 1
    table.nr_made += 1
    table.is_sweep_wanted = True
    return oldest.base


cdef bint is_resident(const WindowTable *table, uint8_t *base, uint64_t inside, uint64_t length) noexcept nogil:
    """Whether all pages of this part of a window are in memory."""
    cdef unsigned char pages[PAGES_MAX]
    cdef uint64_t begin = inside & ~(table.page_bytes - 1)
    cdef uint64_t nr_pages = (inside + length - begin + table.page_bytes - 1) // table.page_bytes
    cdef uint64_t nr
    if nr_pages > PAGES_MAX or mincore(base + begin, nr_pages * table.page_bytes, pages):
        return False
    for nr in range(nr_pages):
        if not pages[nr] & 1:
            return False
    return True


cdef int map_place(Mapping *mapping, int fd, uint64_t at, uint64_t length, iovec *places, int nr_places, int places_max) noexcept nogil:
    """Append where these bytes of the file are mapped to `places`; `map_begin` comes first, once for all of a READ.

    The bytes lie in the file. The places are for system calls only, and hold good until Python code or another READ runs.

    Returns how many places there are then; -1: not all of the bytes are in memory, or there is no window for them.
    """
    cdef WindowTable *table = mapping.table
    cdef uint64_t inside, step
    cdef uint8_t *base
    cdef iovec *last
    while length:
        inside = at % table.window_bytes
        step = min(table.window_bytes - inside, length)
        base = find_window(mapping, fd, at // table.window_bytes)
        if base == NULL or not is_resident(table, base, inside, step):
            return -1
        last = &places[nr_places - 1]
        if nr_places and <uint8_t *>last.iov_base + last.iov_len == base + inside:
            last.iov_len += step
        elif nr_places == places_max:
            return -1
        else:
            places[nr_places].iov_base = base + inside
            places[nr_places].iov_len = step
            nr_places += 1
        at += step
        length -= step
    return nr_places


cdef class Windows:
    """Windows of the files that are served from one event loop; see the module head.

    Context: the thread of that loop.

    Args:
        bytes_max: of all windows together; less than WAYS windows: there are none.
        sweep_wanted: is called after a turn in which a window was mapped.
        window_bytes: of each; a multiple of the page size.
        length_min: a READ that is shorter is copied.

    Attributes:
        nr_mapped: windows that there are now.
        nr_made: windows that there have been.
        nr_sent: READs that were sent from windows.
    """

    def __cinit__(self, uint64_t bytes_max, sweep_wanted, uint64_t window_bytes=WINDOW_BYTES, uint64_t length_min=LENGTH_MIN):
        self.table.page_bytes = <uint64_t>sysconf(_SC_PAGESIZE)
        if not window_bytes or window_bytes % self.table.page_bytes:
            raise ValueError("a window is not a number of whole pages")
        self.table.window_bytes = window_bytes
        self.table.nr_sets = bytes_max // window_bytes // WAYS
        self.sweep_wanted = sweep_wanted
        self._length_min = max(length_min, <uint64_t>1)
        if self.table.nr_sets:
            self.table.windows = <Window *>calloc(self.table.nr_sets * WAYS, sizeof(Window))
            if self.table.windows == NULL:
                raise MemoryError

    def __dealloc__(self):
        # No file refers to it any more.
        if self.table.windows != NULL:
            self._drop(0, True, self.table.nr_mapped)
        free(self.table.windows)

    @property
    def nr_mapped(self):
        return self.table.nr_mapped

    @property
    def nr_made(self):
        return self.table.nr_made

    @property
    def nr_sent(self):
        return self.table.nr_sent

    def takes(self, int fd, uint64_t size):
        """Whether parts of this file may be mapped, and `mincore` tells the truth of it.

        Args: size: bytes.
        """
        cdef uint64_t page = self.table.page_bytes
        cdef uint64_t end = (size + page - 1) // page * page
        cdef unsigned char is_there = 1
        cdef void *base
        if not self.table.nr_sets or sizeof(void *) < 8:
            return False
        base = mmap(NULL, page, PROT_READ, MAP_SHARED, fd, <int64_t>end)
        if base == MAP_FAILED:
            return False
        if mincore(base, page, &is_there):
            is_there = 1
        munmap(base, page)
        return not is_there & 1

    def sweep(self, uint64_t nr_max):
        """Give back windows that were not used since the last sweep, at most so many.

        Returns whether there are more of them; then this sweep goes on with the next call.
        """
        if self._drop(0, False, nr_max):
            return True
        self.table.swept = self.table.clock
        return False

    def drop(self, uint64_t owner, uint64_t nr_max):
        """Give back the windows of a file, at most so many. Returns whether there are more of them.

        Args: owner: `FastFile.owner`.
        """
        return self._drop(owner, False, nr_max)

    cdef bint _drop(self, uint64_t owner, bint is_all, uint64_t nr_max) noexcept:
        """Args: owner: 0: those that were not used since the last sweep."""
        cdef uint64_t nr
        cdef Window *window
        for nr in range(self.table.nr_sets * WAYS):
            window = &self.table.windows[nr]
            if window.base == NULL or not is_all and (window.owner != owner if owner else window.used > self.table.swept):
                continue
            if not nr_max:
                return True
            nr_max -= 1
            unmap(&self.table, window)
        return False


def new_owner():
    """Return a number that no file has had."""
    global nr_owners
    nr_owners += 1
    return nr_owners
