# SPDX-License-Identifier: Apache-2.0
"""`FastFile`: an open file, READs of what the page cache has of it, and WRITEs into the page cache.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. A device has one `FastFile` for each file that it has opened. What the code without the interpreter needs is in its
`File`, a struct of C.

A READ here does not wait for the disk: RWF_NOWAIT is in `read_flags`, except where files are in memory anyway. Instead, the caller learns that
the page cache cannot answer. Only `read_whole` waits.

Three things are for the device to judge: a WRITE that was slow, an error of writing back, and a sync that has not ended in time. They are
noted in the `File`, and the device is told of them at the end of the turn (`take_turn`).
"""

cdef enum:
    WRITE_PIECE = 65536  # one pwrite takes so many bytes at most; see `nbdtarget.devices.file.pieces`
    # To tell the kernel to begin to write back may itself take long, when the kernel throttles. Each time that it takes longer than this, it is left
    # out for twice as many of the next WRITEs, up to KICK_SKIP_MAX.
    KICK_SLOW_NS = 250000
    KICK_SKIP_MAX = 1024
    SLOW_WRITE_NS = 250000  # a batch with a WRITE that takes longer is always timed (`time_anyway`)

WRITE_PIECE_BYTES = WRITE_PIECE  # for the test that it is the same as in Python

cdef enum Found:
    FOUND  # all of it was there
    MISSED  # the page cache has not all of it; the ring may read it
    REFUSED  # Python must carry it out

cdef struct File:
    int fd
    int read_flags
    uint64_t size
    uint64_t read_max
    uint64_t write_max
    int64_t slow_ns
    bint was_slow  # a WRITE took longer than `slow_ns`, and the device does not know yet
    Uring *uring  # NULL: what the page cache does not have is for Python
    uint64_t ring_max
    uint64_t align_mask  # of what the ring reads
    Mapping mapping  # where long READs are sent from
    int64_t nr_reads  # in the ring, begun in this turn; the device does not know of them yet
    unsigned wait_skip  # so many of the next READs are not waited for (`should_wait`)
    unsigned wait_penalty  # what `wait_skip` was set to last
    uint32_t fake_misses  # for tests
    uint32_t fake_state  # a random number
    int fake_error  # for tests
    int64_t fake_send_ns  # for tests
    sync_job *job  # NULL: syncs are Python's
    bint is_left  # a sync has begun, and Python has to take its end
    bint kicks  # the kernel is told to begin to write back
    int kick_error  # what it answered, while the device does not know of it; 0: no error
    int64_t sync_wait_ns
    uint64_t nr_synced
    unsigned kick_skip  # for so many of the next WRITEs it is not told
    unsigned kick_penalty  # what `kick_skip` was set to last


cdef inline bint lies_in(uint64_t offset, uint64_t length, uint64_t size) noexcept nogil:
    return length <= size and offset <= size - length


cdef inline bint read_end(File *file, uint8_t *into, uint64_t at, uint64_t length) noexcept nogil:
    """Read the last bytes of a READ. Returns whether the page cache had all of them; it has not, if the file has become shorter."""
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
    """For tests: whether this READ is taken for a miss; `fake_misses` of 2^32 are."""
    file.fake_state = file.fake_state * 1664525 + 1013904223
    return file.fake_state < file.fake_misses


cdef inline bint ring_takes(const File *file, uint64_t offset, uint64_t length) noexcept nogil:
    return file.uring != NULL and length <= file.ring_max and not (offset | length) & file.align_mask


cdef inline bint file_takes(const File *file, uint64_t offset, uint64_t length) noexcept nogil:
    return length <= file.write_max and lies_in(offset, length, file.size)


cdef inline uint64_t file_write(
    File *file, const uint8_t *data, uint64_t offset, uint64_t length, int *error, int64_t *slow_since
) noexcept nogil:
    """Return how much the page cache took; if that is not all, `error` may say why. If it took long, `slow_since` is set to when it began."""
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
        # No more WRITEs here, until the device has decided (`FastFile.was_slow`).
        file.was_slow = True
        file.write_max = 0
    return put


cdef int64_t kick(File *file, uint64_t at, uint64_t length) noexcept nogil:
    """Tell the kernel to begin to write these bytes back, which a sync will wait for soon. Returns when the call began, if it took long; otherwise 0."""
    cdef int64_t began
    cdef int error
    if file.kick_skip:
        file.kick_skip -= 1
        return 0
    began = now_ns()
    error = errno if sync_file_range(file.fd, <off_t>at, <off_t>length, SYNC_FILE_RANGE_WRITE) else 0
    if error:
        # The kernel may report an error of writing back once only, and this was it. Python decides what that means.
        file.kick_error = error
        file.kick_skip = <unsigned>-1
    elif now_ns() - began > KICK_SLOW_NS:
        file.kick_penalty = min(2 * file.kick_penalty + 1, KICK_SKIP_MAX)
        file.kick_skip = file.kick_penalty
        return began
    return 0


def write_pieces(int fd, payload, Py_ssize_t put, uint64_t offset, Py_ssize_t piece):
    """Write what is left of `payload`, of which `put` bytes are written, in calls of at most `piece` bytes.

    For worker threads: the interpreter's lock is released once for all these calls, and not for each.

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
        fd: belongs to the device, which closes it.
        slow_ns: a WRITE that takes longer is the last one here until `was_slow` has been called.
        was_slow: is called after such a WRITE. `write_max` is 0 then, and the device decides whether it stays so.
        was_unfinished: is called when the page cache took only a part of a WRITE, or nothing. The device gets the same WRITE soon. Takes its offset
            and length, the bytes that the page cache took, the errno (0: none), and how many other WRITEs the device gets before it.
        note_reads: is called with how many READs more are in the ring now; a negative number says how many fewer. While
            there are some, the device keeps the file open.
        sync_left: is called when a sync was begun here, and has failed or takes long. The device has to take its end from the Syncer.
        kick_failed: is called with the errno when the kernel could not begin to write back. None: it is told to begin by syncs only.
        read_failed: is called with the errno when a READ has failed here after a part of its reply had been sent.

    Attributes:
        windows: the mappings that long READs are sent from; None: all READs are copied. Before they are taken away, or the file is closed,
            `Windows.drop` has to be called.
        owner: the number of the file in `windows`.
        ring: where READs go that the page cache cannot answer; None: to Python.
        ring_max: up to which length they go there.
        align: only READs go there whose offset and length are multiples of this power of two.
        fake_misses: for tests: so many of 2^32 READs are taken for misses.
        fake_error: for tests: the errno of reading what is left of a READ from a window; 0: it succeeds.
        fake_send_ns: for tests: how long a send from windows is said to have taken; 0: it is measured.
        size: bytes.
        read_max: up to which length READs are tried in the page cache; 0: none are.
        read_flags: of preadv2.
        write_max: up to which length WRITEs are carried out here; 0: none are.
        syncer: syncs the file. The device lends it while it is idle and may be used here; otherwise None.
        sync_wait_ns: how long the loop waits for the end of a sync.
        nr_synced: how many syncs have succeeded here.
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
