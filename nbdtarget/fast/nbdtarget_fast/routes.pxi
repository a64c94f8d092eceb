# SPDX-License-Identifier: Apache-2.0
"""`Route`: which bytes of a device lie where in which file.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. There are three kinds of routes:

    flat       all bytes lie in one file, at a constant distance
    bitmap     regions, each of which lies in one of two files (a clone that is not yet hydrated)
    table      blocks, which a hash table finds (a cache)

What the code without the interpreter needs is in the `Way` of a route, a struct of C, which points to the owner's own tables. `find` looks
one request up there. NULL as its answer means: this module cannot tell, Python must carry the request out. A request that touches
several regions or blocks is cut into `Piece`s.
"""

cdef enum:
    LOCKED_MAX = 64  # while more blocks are locked, no request takes this way
    NOTED_MAX = 64  # first hits that can be noted in one turn
    MIXED_MAX = 64  # a request that touches more regions or blocks is for Python
    KIND_FLAT = 0
    KIND_BITMAP = 1
    KIND_TABLE = 2

cdef uint32_t NO_ENTRY = 0xFFFFFFFFU
cdef uint64_t HASH_MULTIPLIER = 0x9E3779B1ULL
cdef uint64_t HASH_MASK = 0xFFFFFFFFULL

cdef struct Way:
    bint is_open  # until the route is closed
    int kind
    bint can_read
    bint can_write
    bint is_read_only
    uint64_t begin  # the route is for the bytes [begin, size) of the device
    uint64_t size
    File *file
    int64_t delta  # in a flat route: to be added to an offset of the device
    # A bitmap: regions whose bit is set lie in `file`, the others in `other`.
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
    uint64_t locked[64]  # LOCKED_MAX: blocks that no request may touch
    int nr_locked
    bint notes_hits
    uint64_t noted[64]  # NOTED_MAX: blocks that were hit for the first time
    int nr_noted
    # Served in this turn.
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
    """Return the file that has these bytes, and in `at` their place in it. NULL: Python must carry the request out.

    The caller has verified that they lie in the device.
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
    """Cut a request at the borders of regions or blocks: up to MIXED_MAX pieces, each of which lies in one of them. Returns how many there are; 0: it is for Python."""
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
    """Join pieces that follow each other in a file. Returns how many there are then."""
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
    """Read what lies in several places. FOUND: all of it was there; otherwise the READ is for Python."""
    cdef int nr
    if not nr_pieces:
        return REFUSED
    for nr in range(nr_pieces):
        if length > pieces[nr].file.read_max or file_read(pieces[nr].file, into, pieces[nr].at, pieces[nr].length) != FOUND:
            return REFUSED
        into += pieces[nr].length
    return FOUND


cdef class _Memory:
    """The memory of a Python object, which stays where it is as long as this exists."""

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
        """Copy the numbers of the locked blocks to where `find_by_table` looks. Returns whether requests may take this way now."""
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
        """Tell the policy of the blocks that were noted in this turn."""
        cdef int nr, nr_noted = self.way.nr_noted
        self.way.nr_noted = 0
        for nr in range(nr_noted):
            self._note_hit(self.way.noted[nr])

    cdef tell_windows(self):
        """If windows were mapped in this turn, say so: somebody has to plan a sweep of them."""
        cdef FastFile file
        for file in (self.file, self.other):
            if file is not None and file._windows is not None and file._windows.table.is_sweep_wanted:
                file._windows.table.is_sweep_wanted = False
                file._windows.sweep_wanted()

    cdef FastFile file_of(self, const File *file):
        """Return the object that has this struct, which is of this route."""
        return self.file if file == &self.file.file else self.other

    cdef _Memory borrow(self, owner):
        """Return the memory of `owner`, which stays where it is until the route is closed."""
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
