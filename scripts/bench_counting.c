// SPDX-License-Identifier: Apache-2.0
/* What counting costs on the compiled path, for `bench_metrics.py`: its own code (`nbdtarget_counting.h`), called as `Plane._turn` calls it,
 * around the system calls of a batch: receive, read from the page cache, send. Alone in a loop it would seem cheaper than it is, because what
 * it uses is cold after a system call, or dearer, because it overlaps with one.
 *
 *     bench_counting PER_S_SINGLE PER_S_BATCHES
 *
 * The server is busy: requests come as fast as these numbers say, so no more batches are timed than in such a server.
 *
 * Runs with counting and without take turns, and the median of the differences is printed, in nanoseconds of processor time: a line for
 * each kind of batch, with the counter of the processor and with the clock: kind, requests, ns with the counter, ns with the clock, ns of
 * the system calls, and how many of a hundred batches were timed. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../nbdtarget/fast/nbdtarget_counting.h"

enum { BATCHES = 100, PAIRS = 2001, BLOCK = 4096, BLOCKS = 1024, REQUEST = 28 };

static struct nbdtarget_sampling sampling;
static struct nbdtarget_counter counter;
static uint64_t nr_timed;
static volatile int64_t ended_ns;
static int sockets[2], file;
static char buffer[64 * BLOCK];

static void must(int holds, const char *what) {
    if (holds) return;
    perror(what);
    exit(1);
}

/* Returns the nanoseconds of processor time of a batch. `counts_it`: else nothing is counted. `polls`: the next request is polled for, so
 * there are looks at the time anyway: one after the answer, which counting uses, too, and one when something has come. All runs are of the same
 * machine code, for how it lies in memory decides over some nanoseconds. */
static __attribute__((noinline)) double measure(int requests, int counts_it, int polls) {
    int64_t begun = nbdtarget_look(CLOCK_THREAD_CPUTIME_ID);
    for (int batch = 0; batch < BATCHES; batch++) {
        must(send(sockets[1], buffer, requests * REQUEST, 0) == requests * REQUEST, "send");
        must(recv(sockets[0], buffer, sizeof buffer, MSG_DONTWAIT) == requests * REQUEST, "recv");
        if (counts_it) nbdtarget_begin_batch(&counter, &sampling, polls ? ended_ns : 0);
        for (int nr = 0; nr < requests; nr++) {
            off_t at = (batch * 7 + nr * 13) % BLOCKS * (off_t)BLOCK;
            must(pread(file, buffer + nr % 64 * BLOCK, BLOCK, at) == BLOCK, "pread");
            if (counts_it) {
                counter.nr[0] += 1;
                counter.nr_bytes[0] += BLOCK;
            }
            __asm__ volatile("" ::: "memory"); /* each for itself, as on the path */
        }
        must(send(sockets[0], buffer, BLOCK, 0) == BLOCK, "send");
        if (counts_it) {
            int64_t now = nbdtarget_end_batch(&counter, &sampling);
            if (now) ended_ns = now;
            nr_timed += now != 0;
        } else if (polls) {
            ended_ns = nbdtarget_now_ns();
        }
        must(recv(sockets[1], buffer, BLOCK, 0) == BLOCK, "recv");
    }
    return (double)(nbdtarget_look(CLOCK_THREAD_CPUTIME_ID) - begun) / BATCHES;
}

/* As `measure` with counting. For the sampling it goes on where the last such run has ended, and each has taken `run_ns`, as in the server. */
static double measure_counting(int requests, int polls, int64_t run_ns) {
    static int64_t taken_ns, ended;
    int64_t begun = nbdtarget_now_ns();
    sampling.since_ns += begun - ended - (run_ns - taken_ns);
    double found = measure(requests, 1, polls);
    ended = nbdtarget_now_ns();
    taken_ns = ended - begun;
    return found;
}

static int by_size(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static double median(double *values) {
    qsort(values, PAIRS, sizeof *values, by_size);
    return values[PAIRS / 2];
}

static double without[PAIRS], ticked[PAIRS], clocked[PAIRS];

#define LINE(kind, requests, polls, per_s)                                                                \
    do {                                                                                                  \
        int64_t run_ns = (int64_t)(1e9 * BATCHES * requests / per_s);                                     \
        nr_timed = 0;                                                                                     \
        for (int pair = 0; pair < PAIRS; pair++) {                                                        \
            nbdtarget_use_rate(NULL);                                                                     \
            without[pair] = measure(requests, 0, polls);                                                  \
            clocked[pair] = measure_counting(requests, polls, run_ns) - without[pair];                     \
            nbdtarget_use_rate(rate);                                                                     \
            without[pair] = measure(requests, 0, polls);                                                  \
            ticked[pair] = measure_counting(requests, polls, run_ns) - without[pair];                     \
        }                                                                                                 \
        printf("%s %d %.1f %.1f %.0f %.1f\n", kind, requests, median(ticked), median(clocked), median(without), \
               100. * nr_timed / (2 * PAIRS * BATCHES));                                                  \
    } while (0)

int main(int nr_arguments, char **arguments) {
    struct nbdtarget_moment first = nbdtarget_moment_now();
    double per_s_single = nr_arguments > 2 ? atof(arguments[1]) : 0, per_s_batches = nr_arguments > 2 ? atof(arguments[2]) : 0;
    struct nbdtarget_rate found, *rate = NULL;
    must(per_s_single > 0 && per_s_batches > 0, "PER_S_SINGLE PER_S_BATCHES");
    usleep(20000);
    if (NBDTARGET_HAS_TICKS && nbdtarget_rate_of(first, nbdtarget_moment_now(), &found)) rate = &found;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "socketpair");
    file = memfd_create("blocks", 0);
    must(file >= 0, "memfd_create");
    for (int nr = 0; nr < BLOCKS; nr++) must(write(file, buffer, BLOCK) == BLOCK, "write");
    LINE("single", 1, 0, per_s_single);
    LINE("polled", 1, 1, per_s_single);
    LINE("batch", 8, 0, per_s_batches);
    LINE("batch", 16, 0, per_s_batches);
    LINE("batch", 32, 0, per_s_batches);
    return 0;
}
