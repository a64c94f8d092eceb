# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The compiled half of the server's hot path: plain READs and WRITEs, from socket to file and back.

Theory of operation. Each connection has a `Plane`. Its method `turn` receives a batch of requests, carries out those that are plain, packs
their replies and sends them. It makes no Python object for any of them, and does not hold the interpreter's lock. A request is *plain* if

    it is a READ or a WRITE, and nothing is wrong with it,
    the `Route` of the device can tell in which file its bytes lie, and where, or in which pieces,
    the file answers at once: a READ from the page cache, a WRITE into it; or io_uring takes the READ.

WRITEs with FUA and FLUSHes are taken, too, but for the FLUSH of the device that they need (`syncs.pxi`).

In front of the first request that is not plain, `turn` stops. Python carries that one out and calls `turn` again. So every rule that is not
about plain requests is written once, in Python. Everything that a turn begins ends within it, except READs that io_uring carries out
(`ring_reads.pxi`): nothing else is in flight when Python code runs. So a suspend, a table swap, a removal or the end of a connection has to
wait for no work of this module but those READs.

The event loop calls the `Receiver` of a connection, which runs one turn. It calls Python code only for what is not plain.

Parts. Each of these is a file in the folder `nbdtarget_fast`, and is included below as text. So the C compiler sees a single file, and may
inline the functions of one part in another:

    system_calls   functions of the kernel and of the C library
    clock          what time it is
    counters       how many requests were answered, and how long they took
    files          `FastFile`: an open file, and how it is read and written
    routes         `Route`: which bytes of a device lie where in which file
    wire           numbers and constants of the NBD protocol
    plane          `Plane`: all that is known of one connection
    turns          one turn: receive, serve, send; and the two buffers
    requests       parse requests, and carry them out
    replies        pack replies
    syncs          WRITEs with FUA, and FLUSHes
    stays          the thread that syncs goes on with a client, in the place of the event loop
    mapped_reads   long READs, which the kernel sends from a mapping of the file
    ring_reads     READs that io_uring carries out
    receiver       `Receiver`: what the event loop calls

Who says what may be done. A device gives its `Route` only while its requests may take this way. After that it closes the route, which takes
no more requests. `FastFile` and `Route` have fields that their owners set at any time between two turns (`write_max`, `can_write`, ...), and
they point to tables that their owners change in place: the bitmap of a clone, the hash table of a cache policy. All of these change in the
thread of the event loop only. A turn runs in that thread, too, or in another one while that one stands still (`stays.pxi`).

Memory safety. Every number that comes from a client or from a table is compared with the length of what it points into, before it is used.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE,
    PyBUF_WRITABLE,
    PyBuffer_Release,
    PyObject_GetBuffer,
)
from libc.errno cimport EAGAIN, EFAULT, EINTR, EIO, errno
from cpython.ref cimport Py_DECREF, Py_INCREF, PyObject
from libc.stdint cimport UINT32_MAX, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcmp, memcpy, memmove, memset

from nbdtarget_map cimport Mapping, Windows, map_begin, map_place, map_sent, map_skips
from nbdtarget_ring cimport (
    Read,
    Reader,
    Ring,
    Uring,
    begin_read,
    give_back,
    submit,
    submit_and_wait,
    take_ended,
)
from nbdtarget_sync cimport Syncer, sync_begin, sync_end, sync_job, sync_next
from nbdtarget_tls cimport Records, TlsRecords, iovec, tls_has_pending, tls_receive, tls_send

from nbdtarget_map import new_owner

__all__ = [
    "BOUNDS_NS", "WRITE_PIECE_BYTES",
    "ABI", "BLOCKED", "CLOSED", "DONE", "FAILED", "POLLED", "SLOW", "TURN_OVER", "UNFINISHED",
    "FastFile", "Plane", "Receiver", "Route", "write_pieces",
]

ABI = 14  # of `nbdtarget.fast.compiled`

include "nbdtarget_fast/system_calls.pxi"
include "nbdtarget_fast/clock.pxi"
include "nbdtarget_fast/counters.pxi"
include "nbdtarget_fast/files.pxi"
include "nbdtarget_fast/routes.pxi"
include "nbdtarget_fast/wire.pxi"
include "nbdtarget_fast/plane.pxi"
include "nbdtarget_fast/turns.pxi"
include "nbdtarget_fast/requests.pxi"
include "nbdtarget_fast/replies.pxi"
include "nbdtarget_fast/syncs.pxi"
include "nbdtarget_fast/stays.pxi"
include "nbdtarget_fast/mapped_reads.pxi"
include "nbdtarget_fast/ring_reads.pxi"
include "nbdtarget_fast/receiver.pxi"
