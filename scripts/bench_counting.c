// SPDX-License-Identifier: Apache-2.0
/* What counting costs on the compiled path, for `bench_metrics.py`: the same statements as in nbdtarget/fast/nbdtarget_fast.pyx (`count`,
 * `_count` and the looks at the time), around the system calls of a batch: receive, read from the page cache, send. Alone in a
 * loop they would seem cheaper than they are, because what they use is cold after a system call, or dearer, because they overlap with one.
 *
 * Runs with counting and without take turns, and the median of the differences is printed, in nanoseconds of processor time: a line for
 * each kind of batch, with the counter of the processor and with the clock: kind, requests, ns with the counter, ns with the clock, ns of
 * the system calls. */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <time.h>
#include <unistd.h>

#include "../nbdtarget/fast/nbdtarget_clock.h"

enum { NR_BOUNDS = 12, BATCHES = 100, PAIRS = 1001, BLOCK = 4096, BLOCKS = 1024, REQUEST = 28 };

static const int64_t bounds_ns[NR_BOUNDS] = {25000,   50000,   100000,   250000,   500000,    1000000,
                                             2500000, 5000000, 10000000, 50000000, 250000000, 1000000000};

struct counts {
    uint64_t nr, nr_bytes, taken_ns, buckets[NR_BOUNDS + 1];
};

static struct counts counts[2];
static uint64_t fresh[2], fresh_bytes[2];
static int64_t received_ns;
static volatile int64_t ended_ns;
static int sockets[2], file;
static char buffer[64 * BLOCK];

static inline void count(struct counts *into, uint64_t nr, uint64_t nr_bytes, int64_t taken_ns) {
    int bucket = 0;
    if (taken_ns < 0) taken_ns = 0;
    while (bucket < NR_BOUNDS && taken_ns > bounds_ns[bucket]) bucket++;
    into->nr += nr;
    into->nr_bytes += nr_bytes;
    into->taken_ns += nr * (uint64_t)taken_ns;
    into->buckets[bucket] += nr;
}

static void must(int holds, const char *what) {
    if (holds) return;
    perror(what);
    exit(1);
}

/* Returns the nanoseconds of processor time of a batch. `counts_it`: else nothing is counted. `polls`: the next request is polled for, so
 * there are looks at the time anyway: one after the answer, which counting uses, too, and one when something has come. */
static inline __attribute__((always_inline)) double measure(int requests, int counts_it, int polls) {
    int64_t begun = nbdtarget_look(CLOCK_THREAD_CPUTIME_ID);
    for (int batch = 0; batch < BATCHES; batch++) {
        must(send(sockets[1], buffer, requests * REQUEST, 0) == requests * REQUEST, "send");
        must(recv(sockets[0], buffer, sizeof buffer, MSG_DONTWAIT) == requests * REQUEST, "recv");
        if (counts_it && !polls) received_ns = nbdtarget_now_ns();
        for (int nr = 0; nr < requests; nr++) {
            off_t at = (batch * 7 + nr * 13) % BLOCKS * (off_t)BLOCK;
            must(pread(file, buffer + nr % 64 * BLOCK, BLOCK, at) == BLOCK, "pread");
            if (counts_it) {
                fresh[0] += 1;
                fresh_bytes[0] += BLOCK;
            }
            __asm__ volatile("" ::: "memory"); /* each for itself, as on the path */
        }
        must(send(sockets[0], buffer, BLOCK, 0) == BLOCK, "send");
        if (counts_it || polls) ended_ns = nbdtarget_now_ns();
        if (counts_it) {
            for (int op = 0; op < 2; op++)
                if (fresh[op] || fresh_bytes[op]) {
                    count(&counts[op], fresh[op], fresh_bytes[op], ended_ns - received_ns);
                    fresh[op] = fresh_bytes[op] = 0;
                }
            if (polls) received_ns = ended_ns; /* the look that found something is as old as that */
        }
        must(recv(sockets[1], buffer, BLOCK, 0) == BLOCK, "recv");
    }
    return (double)(nbdtarget_look(CLOCK_THREAD_CPUTIME_ID) - begun) / BATCHES;
}

static int by_size(const void *one, const void *other) {
    double a = *(const double *)one, b = *(const double *)other;
    return (a > b) - (a < b);
}

static double median(double *values) {
    qsort(values, PAIRS, sizeof *values, by_size);
    return values[PAIRS / 2];
}

static double without[PAIRS], counter[PAIRS], clocked[PAIRS];

#define LINE(kind, requests, polls)                                                                       \
    do {                                                                                                  \
        for (int pair = 0; pair < PAIRS; pair++) {                                                        \
            nbdtarget_use_rate(NULL);                                                                     \
            without[pair] = measure(requests, 0, polls);                                                  \
            clocked[pair] = measure(requests, 1, polls) - without[pair];                                  \
            nbdtarget_use_rate(rate);                                                                     \
            without[pair] = measure(requests, 0, polls);                                                  \
            counter[pair] = measure(requests, 1, polls) - without[pair];                                  \
        }                                                                                                 \
        printf("%s %d %.1f %.1f %.0f\n", kind, requests, median(counter), median(clocked), median(without)); \
    } while (0)

int main(void) {
    struct nbdtarget_moment first = nbdtarget_moment_now();
    struct nbdtarget_rate found, *rate = NULL;
    usleep(20000);
    if (NBDTARGET_HAS_TICKS && nbdtarget_rate_of(first, nbdtarget_moment_now(), &found)) rate = &found;
    must(socketpair(AF_UNIX, SOCK_STREAM, 0, sockets) == 0, "socketpair");
    file = memfd_create("blocks", 0);
    must(file >= 0, "memfd_create");
    for (int nr = 0; nr < BLOCKS; nr++) must(write(file, buffer, BLOCK) == BLOCK, "write");
    LINE("single", 1, 0);
    LINE("polled", 1, 1);
    LINE("batch", 8, 0);
    LINE("batch", 16, 0);
    return 0;
}
