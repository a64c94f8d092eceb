# SPDX-License-Identifier: Apache-2.0
"""`Receiver`: what the event loop calls when the socket of a connection can be read.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.

Theory of operation. Between the loop and the system calls there is no Python code, as long as all requests are plain. *Python* means here:
all code of the connection outside of this module. After it has run, the Receiver looks whether the connection is plain: whether its next
requests may be served here, from the two buffers. As long as none has run since, it need not look. So Python says `python_ran` before the
loop may call the Receiver again.
"""


cdef class Receiver:
    """What the loop calls when the socket of a connection can be read.

    Args:
        plane: of the connection.
        maybe_route: returns the route of the device, or None.
        is_plain: returns whether the next requests may be served here.
        received, output: where the four places of the two buffers are; see `nbdtarget.server.fast_turn`.
        polling: its `last` is the Receiver that was called last, of all connections. Only a connection that is called again and again polls.
        may_poll: returns whether nothing is in flight that polling would hold up.
        has_no_losses: returns whether no earlier loss of data makes a FLUSH fail.
        find_loop_fd: returns what becomes the `loop_fd` of the plane, while the loop watches its socket. It is called once, if at all.
        poll_ns: after an answer, how long to look at the socket for the next request.
        poll_streak, poll_skip_max, poll_rest, late: see `nbdtarget.server.poller`.
        readable: is called for everything that is not plain; without a Receiver the loop would call it.
        stopped: is called with the reason why a turn has ended, if that is not DONE or POLLED, and goes on from there.
        ended: is called after a turn that has served everything, if Python had run before it.
        failed: is called with an exception that another one of these has raised.
    """

    cdef Plane plane
    cdef Route route
    cdef bint is_sure  # Python has not run since the last turn, so the next requests may be served here
    cdef object maybe_route
    cdef object is_plain
    cdef object received
    cdef object output
    cdef object polling
    cdef object may_poll
    cdef object has_no_losses
    cdef object find_loop_fd  # None: it has been called
    cdef int64_t poll_ns
    cdef unsigned poll_streak
    cdef unsigned poll_skip_max
    cdef unsigned poll_rest
    cdef object late
    cdef unsigned streak  # turns in a row with one request each
    cdef unsigned skip  # turns that are not polled
    cdef unsigned penalty  # how many were skipped after the last miss
    cdef object readable
    cdef object stopped
    cdef object ended
    cdef object failed

    def __init__(self, Plane plane not None, *, maybe_route, is_plain, received, output, polling, may_poll, has_no_losses, find_loop_fd=None,
                 int64_t poll_ns, unsigned poll_streak, unsigned poll_skip_max, unsigned poll_rest, late,
                 readable, stopped, ended, failed):
        self.plane = plane
        self.maybe_route, self.is_plain = maybe_route, is_plain
        self.received, self.output = received, output
        self.polling, self.may_poll, self.has_no_losses = polling, may_poll, has_no_losses
        self.find_loop_fd = find_loop_fd
        self.poll_ns, self.poll_streak = poll_ns, poll_streak
        self.poll_skip_max, self.poll_rest = poll_skip_max, poll_rest
        self.late, plane.late_ns = late, late.late_ns
        self.readable, self.stopped, self.ended, self.failed = readable, stopped, ended, failed

    def python_ran(self):
        """Look anew before the next turn: something of the connection may have changed."""
        self.is_sure = False

    def close(self):
        """The connection is closed: let go of all that refers to it."""
        if self.plane is not None and self.polling.last is self:
            self.polling.last = None
        self.is_sure = False
        self.plane = None
        self.route = None
        self.maybe_route = self.is_plain = self.received = self.output = self.polling = self.may_poll = self.has_no_losses = self.find_loop_fd = None
        self.readable = self.stopped = self.ended = self.failed = None

    def __call__(self):
        try:
            if self.is_sure and self.route.way.is_open:
                self._turn()
            elif self.plane is not None:
                self._look()
        except Exception as error:
            self.is_sure = False
            if self.failed is None:
                raise
            self.failed(error)

    cdef int _look(self) except -1:
        """Python has run: look what there is to do, and do it."""
        self.is_sure = False
        self.route = self.maybe_route()
        if self.route is None or not self.is_plain():
            self.readable()
            return 0
        self.plane.begin, self.plane.end = self.received.begin, self.received.end
        self.plane.base, self.plane.out = self.output.base, self.output.end
        self.is_sure = True
        if self._turn() and self.ended is not None:
            self.ended()
        return 0

    cdef int _verify(self) except -1:
        """For tests: verify what `is_sure` says."""
        cdef Plane plane = self.plane
        if not self.is_plain() or self.route is not self.maybe_route():
            raise AssertionError("Python has run, and has not said so")
        if (plane.begin, plane.end) != (self.received.begin, self.received.end):
            raise AssertionError("the places of the receive buffer have changed")
        if (plane.base, plane.out) != (self.output.base, self.output.end):
            raise AssertionError("the places of the arena have changed")
        return 0

    cdef bint _polls(self) except -1:
        """Whether to look at the socket for the next request after an answer."""
        if self.polling.last is not self:
            self.polling.last = self
            self.streak = 0
        elif self.streak < self.poll_streak:
            self.streak += 1
        if self.skip:
            self.skip -= 1
            return False
        return self.streak >= self.poll_streak and self.poll_ns > 0 and self.may_poll()

    cdef int _lone_sync(self) except -1:
        """For which requests a sync may be made within this turn, as far as this connection knows."""
        self.plane.sync_credit -= 1
        if self.streak < self.poll_streak or not self.may_poll():
            return LONE_NOTHING
        if self.find_loop_fd is not None:
            self.plane.loop_fd = self.find_loop_fd()
            self.find_loop_fd = None
        return LONE_ALL if self.has_no_losses() else LONE_FUA

    cdef bint _turn(self) except -1:
        """Returns whether everything is served."""
        cdef Plane plane = self.plane
        cdef Py_ssize_t begin, end, base, out
        cdef int64_t poll_ns
        cdef int stop
        poll_ns = self.poll_ns if self._polls() else 0
        plane.waits = self.streak >= self.poll_streak and self.poll_ns > 0
        if plane.poison:
            self._verify()
        begin, end, base, out = plane.begin, plane.end, plane.base, plane.out
        stop = take_turn(plane, self.route, poll_ns, False, self._lone_sync() if plane.sync_credit else LONE_NOTHING)
        if self.plane is None:
            return False  # a callback has closed the connection
        # Python is told only of what has changed.
        if plane.begin != begin or plane.end != end:
            self.received.served(plane.begin, plane.end)
        if plane.base != base or plane.out != out:
            self.output.sent_to(plane.base, plane.out)
        if plane.nr_syncs:
            plane.flush_for(*plane.take_syncs())
            if self.plane is None:
                return False
        if plane.nr_hits or plane.nr_sync_hits:
            self.penalty = 0
            # Hits before durable requests ask for no rest: while such a client waits for the disk, the processor is free.
            self.skip = min(plane.nr_hits, 1 << 20) * self.poll_rest
        if plane.was_late:
            self.skip += <unsigned>self.late.note_late()
        elif plane.nr_hits or plane.nr_sync_hits:
            self.late.note_hits(plane.nr_hits + plane.nr_sync_hits)
        if plane.was_batch:
            self.streak = 0
        if stop == STOP_DONE:
            return True
        if stop == STOP_POLLED:
            self.penalty = min(2 * self.penalty + 1, self.poll_skip_max)
            self.skip += self.penalty
            return True
        self.is_sure = False
        self.stopped(stop)
        return False
