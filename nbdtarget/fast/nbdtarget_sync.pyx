# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# cython: initializedcheck=False
"""fdatasync, and writeback of ranges, in a thread of its own that never needs the interpreter.

Theory of operation. A sync of a fast disk takes less time than two Python threads need to hand it over, because each of
them needs the interpreter's lock when the other one has it. So each open file may have a `Syncer`: one thread, in C,
and one sync at a time.

    begin           the loop's thread wakes the other one, by a semaphore
    (fdatasync)     the other thread leaves the errno, and writes to an eventfd
    take            the loop, which watches the eventfd, takes the errno

*At once.* The compiled half of a connection asks for a sync without Python (`sync_begin`), and waits for it a moment. As long as it waits, the thread answers the client
itself when the sync has ended well: so the client need not wait until the loop's thread has its processor again, too. Who has the answer is decided by one word in memory:

    loop: WAITS  ->  thread: CLAIMED, sends  ->  ENDED        the client has its answer
    loop: WAITS  ->  loop: NOBODY, has waited long enough     the thread tells the eventfd; nobody has answered yet

A sync that has failed, or that was not waited for to its end, is for `take`.

After the answer the thread may go on, if `sync_begin` was told how (`next`): it waits for the next request that needs a sync, while the loop still waits. Each of these syncs is waited for as long as the first one:

    thread: CLAIMED  ->  WAITS, with another number        the next sync has begun; the loop is not woken up for that

While the word is CLAIMED, the thread may use what is the loop's. From WAITS on it may not, until it has claimed the next answer.

`begin_behind` has the thread do something else in the same way: begin to write ranges back, wait for others, and drop those from the page
cache. A Python thread that does so keeps the loop waiting whenever it loses its processor between two of these calls, while it has the lock.

*Priority.* What no client waits for is done by threads that give way (`give_way`): a batch job, nicer than the others, and with a long time slice. Linux
6.12 and later lets whoever wakes up with a shorter slice have the processor at once; before, it may have to wait until the slice is over. The
thread of a Syncer that is made to give way does its work in pieces of PIECE_BYTES, because in the kernel it keeps its
processor until the system call returns.

The thread is started by the first `begin`, and ended by `close`. It works on memory of its own, which is never freed while the thread
runs: so a Syncer may be dropped, without `close`, while a disk hangs.
"""

from libc.errno cimport errno
from libc.stdint cimport int64_t, uint8_t
from libc.stdlib cimport calloc, free
from libc.string cimport memcpy

import os

cdef extern from *:
    """
    #include <errno.h>
    #include <fcntl.h>
    #include <linux/futex.h>
    #include <pthread.h>
    #include <semaphore.h>
    #include <sched.h>
    #include <signal.h>
    #include <stdint.h>
    #include <string.h>
    #include <sys/eventfd.h>
    #include <sys/resource.h>
    #include <sys/socket.h>
    #include <sys/syscall.h>
    #include <time.h>
    #include <unistd.h>

    enum { SYNC_IDLE, SYNC_ASKED, SYNC_DONE };

    /* The two lowest bits of `waiter`: see *At once*. Above them stands a number, which is another one for each sync. */
    enum { SYNC_NOBODY, SYNC_WAITS, SYNC_CLAIMED, SYNC_ENDED, SYNC_WAITER_MASK = 3, SYNC_WAITER_STEP = 4 };
    enum { SYNC_ANSWER_MAX = 32, SYNC_LOOK_NS = 500000 };

    typedef struct { int64_t begin, end; } sync_range;
    struct sync_job {
        int state, status, fd, event_fd, is_closed, nice_step;
        unsigned waiter;
        int sock;
        size_t answer_length;
        ssize_t nr_sent;
        char answer[SYNC_ANSWER_MAX];
        int64_t begun_ns; /* when this sync, or what comes before it, has begun, of CLOCK_MONOTONIC */
        /* See `sync_begin`; NULL: the client is the loop's after the answer. */
        int64_t (*next)(void *context, ssize_t nr_sent, char *answer);
        void *context;
        int64_t fake_ns; /* for tests: a sync takes so much longer */
        /* NULL: fdatasync. Otherwise the ranges that are to be begun, and then those that are to be waited for. */
        sync_range *ranges;
        size_t nr_begun, nr_ranges;
        sem_t asked;
        pthread_t thread;
    };

    static inline int sync_state(sync_job *job) { return __atomic_load_n(&job->state, __ATOMIC_ACQUIRE); }
    static inline void sync_become(sync_job *job, int state) { __atomic_store_n(&job->state, state, __ATOMIC_RELEASE); }
    #define SYNC_PIECE_BYTES (1 << 20)
    #define SYNC_SLICE_NS 100000000ULL /* the longest that Linux takes */
    /* The first version of the kernel's struct sched_attr, which not all C libraries have. */
    typedef struct {
        uint32_t size, policy;
        uint64_t flags;
        int32_t nice;
        uint32_t priority;
        uint64_t runtime, deadline, period;
    } sync_attr;
    /* What cannot be had (it may be forbidden, by a filter of system calls) leaves the thread less polite. */
    static void sync_give_way(int nice_step) {
        const int nice = getpriority(PRIO_PROCESS, 0) + nice_step;
        const sync_attr attr = {
            .size = sizeof attr, .policy = SCHED_BATCH, .nice = nice < 19 ? nice : 19, .runtime = SYNC_SLICE_NS,
        };
        if (!syscall(SYS_sched_setattr, 0, &attr, 0))
            return;
        setpriority(PRIO_PROCESS, 0, attr.nice);
        const struct sched_param none = { 0 };
        sched_setscheduler(0, SCHED_BATCH, &none);
    }
    static int sync_behind(const sync_job *job) {
        const int all = SYNC_FILE_RANGE_WAIT_BEFORE | SYNC_FILE_RANGE_WRITE | SYNC_FILE_RANGE_WAIT_AFTER;
        for (size_t nr = 0; nr < job->nr_ranges; nr++) {
            const sync_range *range = &job->ranges[nr];
            const int is_begun = nr < job->nr_begun;
            for (int64_t at = range->begin, end; at < range->end; at = end) {
                /* Pieces end where the large folios of the page cache do, which are dropped whole or not at all. */
                end = job->nice_step ? (at / SYNC_PIECE_BYTES + 1) * SYNC_PIECE_BYTES : range->end;
                if (end > range->end)
                    end = range->end;
                if (sync_file_range(job->fd, at, end - at, is_begun ? SYNC_FILE_RANGE_WRITE : all))
                    return errno;
                int error = is_begun ? 0 : posix_fadvise(job->fd, at, end - at, POSIX_FADV_DONTNEED);
                if (error)
                    return error;
            }
            /* What is larger than a piece is left; now it takes no time to look at the others. */
            int error = is_begun ? 0 : posix_fadvise(job->fd, range->begin, range->end - range->begin, POSIX_FADV_DONTNEED);
            if (error)
                return error;
        }
        return 0;
    }
    static int sync_file(const sync_job *job) {
        const struct timespec more = {job->fake_ns / 1000000000, job->fake_ns % 1000000000};
        int status = fdatasync(job->fd) ? errno : 0;
        if (job->fake_ns)
            nanosleep(&more, NULL);
        return status;
    }
    static inline unsigned sync_waiter(sync_job *job) { return __atomic_load_n(&job->waiter, __ATOMIC_ACQUIRE); }
    static inline int sync_pass(sync_job *job, unsigned waiter, unsigned to) {
        return __atomic_compare_exchange_n(
            &job->waiter, &waiter, (waiter & ~SYNC_WAITER_MASK) | to, 0, __ATOMIC_ACQ_REL, __ATOMIC_ACQUIRE);
    }
    static inline int64_t sync_now_ns(void) {
        struct timespec now;
        clock_gettime(CLOCK_MONOTONIC, &now);
        return now.tv_sec * 1000000000LL + now.tv_nsec;
    }
    /* The loop begins to wait for the next sync, which began at `begun_ns`. */
    static void sync_expect(sync_job *job, int64_t begun_ns) {
        const unsigned number = (job->waiter & ~SYNC_WAITER_MASK) + SYNC_WAITER_STEP;
        __atomic_store_n(&job->begun_ns, begun_ns, __ATOMIC_RELAXED);
        __atomic_store_n(&job->waiter, number | SYNC_WAITS, __ATOMIC_RELEASE);
    }
    static void sync_ask(sync_job *job) {
        sync_expect(job, sync_now_ns());
        sync_become(job, SYNC_ASKED);
        sem_post(&job->asked);
    }
    /* Wait for what was asked for. Returns 1 if it has ended, 0 if it is left to itself. */
    static int sync_await(sync_job *job, int64_t wait_ns) {
        for (;;) {
            const unsigned waiter = sync_waiter(job);
            const unsigned state = waiter & SYNC_WAITER_MASK;
            /* Once the answer is claimed, the thread soon ends, or begins another sync, which the loop is not woken up for. */
            int64_t left = SYNC_LOOK_NS;
            if (state == SYNC_ENDED)
                return 1;
            if (state == SYNC_WAITS) {
                left = __atomic_load_n(&job->begun_ns, __ATOMIC_RELAXED) + wait_ns - sync_now_ns();
                /* If this is another sync meanwhile, so is the number. */
                if (left <= 0 && sync_pass(job, waiter, SYNC_NOBODY))
                    return 0;
                if (left <= 0)
                    continue;
            }
            const struct timespec time = {left / 1000000000, left % 1000000000};
            syscall(SYS_futex, &job->waiter, FUTEX_WAIT_PRIVATE, waiter, &time, NULL, 0);
        }
    }
    /* A sync of the thread has ended. Returns whether all is done that was asked for. */
    static int sync_ended(sync_job *job) {
        const unsigned waiter = sync_waiter(job);
        const uint64_t one = 1;
        int64_t ago_ns = 0;
        if ((waiter & SYNC_WAITER_MASK) != SYNC_WAITS || !sync_pass(job, waiter, SYNC_CLAIMED)) {
            sync_become(job, SYNC_DONE);
            /* It never blocks: the counter is taken once for each sync. */
            while (write(job->event_fd, &one, sizeof one) < 0 && errno == EINTR) {}
            return 1;
        }
        if (!job->status && job->answer_length)
            job->nr_sent = send(job->sock, job->answer, job->answer_length, MSG_DONTWAIT | MSG_NOSIGNAL);
        if (!job->status && job->next)
            ago_ns = job->next(job->context, job->nr_sent, job->answer);
        if (ago_ns) {
            sync_expect(job, sync_now_ns() - ago_ns);
            return 0;
        }
        sync_become(job, SYNC_DONE);
        __atomic_store_n(&job->waiter, waiter | SYNC_ENDED, __ATOMIC_RELEASE);
        syscall(SYS_futex, &job->waiter, FUTEX_WAKE_PRIVATE, 1, NULL, NULL, 0);
        return 1;
    }
    static void *sync_work(void *argument) {
        sync_job *job = argument;
        if (job->nice_step)
            sync_give_way(job->nice_step);
        for (;;) {
            while (sem_wait(&job->asked)) {}
            if (job->is_closed)
                return NULL;
            do {
                job->status = job->ranges ? sync_behind(job) : sync_file(job);
            } while (!sync_ended(job));
        }
    }
    /* Returns 0 or an errno. Signals are for the loop's thread. */
    static int sync_start(sync_job *job) {
        sigset_t all, before;
        sigfillset(&all);
        pthread_sigmask(SIG_SETMASK, &all, &before);
        int error = pthread_create(&job->thread, NULL, sync_work, job);
        pthread_sigmask(SIG_SETMASK, &before, NULL);
        return error;
    }
    """
    enum:
        SYNC_IDLE
        SYNC_ASKED
        SYNC_DONE
    int EFD_NONBLOCK
    int EFD_CLOEXEC
    int sync_file(const sync_job *job) nogil
    void sync_ask(sync_job *job) nogil
    int sync_await(sync_job *job, int64_t wait_ns) nogil
    enum:
        SYNC_ANSWER_MAX
    int eventfd(unsigned value, int flags) nogil
    int sem_init(sem_t *semaphore, int shared, unsigned value) nogil
    int sem_post(sem_t *semaphore) nogil
    int pthread_join(pthread_t thread, void **value) nogil
    int close(int fd) nogil
    ssize_t sys_read "read"(int fd, void *data, size_t length) nogil
    int sync_state(sync_job *job) nogil
    void sync_become(sync_job *job, int state) nogil
    int sync_start(sync_job *job) nogil
    void sync_give_way(int nice_step) nogil
    enum:
        SYNC_PIECE_BYTES

ABI = 14  # of `nbdtarget.fast.compiled`
RUNS = -1  # what `take` returns while a sync runs
PIECE_BYTES = SYNC_PIECE_BYTES


def give_way(int nice_step):
    """Have the calling thread come after those who serve clients, as far as the kernel lets it; see *Priority* above.

    Args: nice_step: so much nicer than it is.
    """
    with nogil:
        sync_give_way(nice_step)


cdef void sync_begin(
    sync_job *job, int sock, const uint8_t *answer, size_t length, sync_next following, void *context
) noexcept nogil:
    """Have the thread sync, and send the answer if that has succeeded; `sync_end` must follow.

    Args:
        job: idle, and its thread has been started.
        length: of the answer; 0: the caller sends it.
        following: is called in the thread after an answer, with `context`, how much of the answer was sent, and where the next answer goes, of the same length.
            It waits for the next request that needs a sync, and returns how many ns ago that has begun, at least 1; 0: there is
            none. Not when: the two modules may tell the time by different clocks. NULL: there is never one.
    """
    free(job.ranges)
    job.ranges = NULL
    job.sock = sock
    job.answer_length = min(length, <size_t>SYNC_ANSWER_MAX)
    memcpy(job.answer, answer, job.answer_length)
    job.nr_sent = 0
    job.next = following
    job.context = context
    sync_ask(job)


cdef int sync_end(sync_job *job, int64_t wait_ns, ssize_t *sent) noexcept nogil:
    """Wait for the end, for so long for each sync. Returns 0, an errno, or RUNS: then it is for `take`, as an error is.

    Args: sent: how much of the last answer was sent; the rest is the caller's.
    """
    sent[0] = 0
    if not sync_await(job, wait_ns):
        return -1
    if not job.status:
        sync_become(job, SYNC_IDLE)
        sent[0] = max(job.nr_sent, 0)
    return job.status


cdef class Syncer:
    """Syncs one open file, once at a time; see the module head.

    Context: the thread of the event loop.

    Args:
        fd: stays the caller's, who keeps it open until `close` has returned.
        nice_step: its thread gives way, and is so much nicer; 0: it does not.

    Attributes:
        event_fd: readable when a sync has ended.
        fake_ns: for tests: syncs take so much longer.

    Raises: OSError, MemoryError: no eventfd, no memory.
    """

    def __cinit__(self, int fd, int nice_step=0):
        self.job = <sync_job *>calloc(1, sizeof(sync_job))
        if self.job == NULL:
            raise MemoryError
        self.job.fd = fd
        self.job.nice_step = nice_step
        self.job.event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC)
        if self.job.event_fd < 0:
            raise OSError(errno, os.strerror(errno))
        sem_init(&self.job.asked, 0, 0)

    def __dealloc__(self):
        if self.job == NULL or self.is_started:
            return  # the thread uses it
        if self.job.event_fd >= 0:
            close(self.job.event_fd)
        free(self.job.ranges)
        free(self.job)

    @property
    def event_fd(self):
        return self.job.event_fd

    @property
    def fake_ns(self):
        return self.job.fake_ns

    @fake_ns.setter
    def fake_ns(self, int64_t value):
        self.job.fake_ns = value

    def begin(self):
        """Begin to sync; `take` tells the end. Raises: OSError: there can be no thread, and nothing was begun."""
        self._prepare()
        self._ask()

    def begin_behind(self, list ranges not None, list before not None):
        """Begin to write `ranges` back, and then wait for `before`, and drop it from the page cache; `take` tells the end.

        Each range is a tuple of its begin and end in the file. The first call that fails is the last one.

        Durable: nothing. The errors of the pages in `before` are told here, and then not by the next sync of the open file.
        Raises: OSError, MemoryError: there can be no thread, or there is no memory, and nothing was begun.
        """
        cdef Py_ssize_t nr, nr_begun = len(ranges), nr_ranges = nr_begun + len(before)
        cdef sync_range *copied
        self._prepare()
        # One more than there are: what has no range is no fdatasync.
        copied = <sync_range *>calloc(nr_ranges + 1, sizeof(sync_range))
        if copied == NULL:
            raise MemoryError
        try:
            for nr in range(nr_ranges):
                copied[nr].begin, copied[nr].end = ranges[nr] if nr < nr_begun else before[nr - nr_begun]
        except BaseException:
            free(copied)
            raise
        self.job.ranges = copied
        self.job.nr_begun = nr_begun
        self.job.nr_ranges = nr_ranges
        self._ask()

    cdef int _prepare(self) except -1:
        if sync_state(self.job) != SYNC_IDLE:
            raise ValueError("one sync at a time")
        free(self.job.ranges)
        self.job.ranges = NULL
        return 0

    cdef int _ask(self) except -1:
        cdef int error
        if not self.is_started:
            error = sync_start(self.job)
            if error:
                raise OSError(error, os.strerror(error))
            self.is_started = True
        sync_become(self.job, SYNC_ASKED)
        sem_post(&self.job.asked)
        return 0

    def take(self):
        """Return 0 or the errno of the sync that has ended, or RUNS."""
        cdef char count[8]
        sys_read(self.job.event_fd, count, 8)
        if sync_state(self.job) != SYNC_DONE:
            return RUNS
        sync_become(self.job, SYNC_IDLE)
        return self.job.status

    def close(self):
        """End the thread. The caller has taken the end of each sync. Idempotent."""
        if sync_state(self.job) != SYNC_IDLE:
            raise ValueError("a sync runs")
        if not self.is_started:
            return
        self.job.is_closed = 1
        sem_post(&self.job.asked)
        with nogil:
            pthread_join(self.job.thread, NULL)
        self.is_started = False
