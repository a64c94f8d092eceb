# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""The compiled half of the server's hot path: plain READs and WRITEs, from socket to file and back.

Theory of operation. A `Plane` belongs to one connection. `Plane.turn` receives a batch of requests,
carries out those that are plain, packs their replies and sends them: without a Python object for any of
them, and without the interpreter's lock. A request is *plain* if

    it is a READ or a WRITE, and nothing is wrong with it,
    the `Route` of the device can tell in which file its bytes lie, and where, or in which pieces,
    the file answers at once: a READ from the page cache, a WRITE into it; or io_uring takes the READ.

A WRITE with FUA and a FLUSH need a FLUSH of the whole device in the end. Such a WRITE is written as a plain one, and the cookies of both are
noted. The kernel begins to write such data back at once (`kick`), while the thread that syncs is busy or asleep; so it does with the data of plain WRITEs
of a client that has a FLUSH follow each one or two of them. Python takes them after the turn (`take_syncs`), submits one FLUSH for all of a kind, and answers them when it has ended.

A client that is alone and asks for one durable thing at a time would wait for Python twice, and for two threads that hand over to each other. So
while the route says that a FLUSH of the device is a sync of one file (`Route.may_sync`), and the file has lent its `Syncer`, the sync is made in the turn (`_sync_alone`): the
thread of the Syncer syncs, and answers; the loop waits for it, up to `FastFile.sync_wait_ns`. A sync that fails, or takes longer, is Python's: it
learns of the sync (`sync_left`), and the request goes the usual way.

That is two threads for each request, and each hands over to the other. So the thread goes on in the place of the loop (`_serve_on`), which still stands still: it waits for what the loop would
wait for, the next request of the client and all other events (`loop_fd`), and serves the client alone, until something else comes, or nothing for `stay_idle_ns`, or for `stay_ns`. The loop looks at each of these syncs as at the first
one: if it takes too long, the loop goes on, and the thread touches nothing of the connection any more.

In front of the first request that is not plain, `turn` stops. Python carries that one out and calls `turn`
again. So every rule that is not about plain requests is written once, in Python. And everything but such READs
ends inside `turn`: nothing else is in flight when Python code runs. A suspend, a table swap, a
removal or the end of a connection therefore never has to wait for this module, but for its READs.

READs that the page cache cannot answer go to the ring of the file (`nbdtarget_ring`), one entry for each and one system
call for all of a batch. Each has a buffer of its own, and its reply leaves from there (`Plane.reads_ended`). Before
any other Python code runs, all who must wait for such a READ have been told of it (`_note_begun`):

    the mapped devices on its way   `Route.in_flight`: a suspend, a swap and a removal wait
    its block of a cache            `Route.hold`: the cache block is not used for another one meanwhile
    its file                        `FastFile.note_reads`: the descriptor stays open
    its connection                  `Plane.ring_reads`: it counts against all bounds, and the connection is not released

So it does not matter if the route is closed meanwhile. A READ that fails or comes short is Python's.

A long READ is not copied into the arena: the kernel sends it from a mapping of the file (`nbdtarget_map`), at once and within one system call (`_send_mapped`). What
the socket does not take is read into the arena before anything else happens. So nothing that waits to be sent refers to a mapping, and a suspend, a swap or
a later WRITE meets the same as after any other READ. A WRITE of another client at the same time may show in a part of the reply, as it may with pread.

A client that asks for one READ at a time waits for two wake-ups: when the disk has answered, and when its next request
has come. Both cost more than the READ of a fast disk. So while a connection is the only one that has something to do, and
sends one request at a time, a READ that is alone is waited for, up to WAIT_NS. That holds the loop up as polling does,
and no longer than a turn lasts (`turn_ns`), but the processor is free meanwhile. A slow disk is soon not waited for any more (`_wait`).

    Python   receive buffer   [begin, end): received and not yet served
             arena            [base, out): replies that are packed and not yet sent

`turn` uses the two buffers and the four numbers, and Python reads the numbers afterwards. Neither
looks at them while the other one runs.

With TLS `nbdtarget_tls` stands between the socket and the two buffers. It may have received more than the receive buffer takes, and the
loop does not know of that: so a turn does not end with DONE before all of it is served.

The loop calls the `Receiver` of a connection, which runs one turn. It calls Python code only for what is not plain.

Who says what may be done. A device gives its `Route` only while its requests may take this way, and closes it
then; it is looked at before each turn. `FastFile` and `Route` have fields that their owners set at any time between two
turns (`write_max`, `can_write`, ...), and they point to tables that their owners change in place: the bitmap
of a clone, the hash table of a cache policy. All of these change in the thread of the event loop only, and
that is the thread which is here.

Memory safety. Every number that comes from a client or from a table is compared with the length of what it
points into, before it is used.
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
include "nbdtarget_fast/replies.pxi"
include "nbdtarget_fast/receiver.pxi"
