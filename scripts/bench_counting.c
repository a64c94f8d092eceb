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

/* Returns the nanoseconds of processor time of a batch. `looks`: at the time, 0: nothing is counted. */
static inline __attribute__((always_inline)) double measure(int requests, int looks) {
    int64_t begun = nbdtarget_look(CLOCK_THREAD_CPUTIME_ID);
    for (int batch = 0; batch < BATCHES; batch++) {
        must(send(sockets[1], buffer, requests * REQUEST, 0) == requests * REQUEST, "send");
        must(recv(sockets[0], buffer, sizeof buffer, MSG_DONTWAIT) == requests * REQUEST, "recv");
        if (looks > 1) received_ns = nbdtarget_now_ns();
        for (int nr = 0; nr < requests; nr++) {
            off_t at = (batch * 7 + nr * 13) % BLOCKS * (off_t)BLOCK;
            must(pread(file, buffer + nr % 64 * BLOCK, BLOCK, at) == BLOCK, "pread");
            if (looks) {
                fresh[0] += 1;
                fresh_bytes[0] += BLOCK;
            }
            __asm__ volatile("" ::: "memory"); /* each for itself, as on the path */
        }
        must(send(sockets[0], buffer, BLOCK, 0) == BLOCK, "send");
        if (looks) {
            int64_t now = nbdtarget_now_ns();
            for (int op = 0; op < 2; op++)
                if (fresh[op] || fresh_bytes[op]) {
                    count(&counts[op], fresh[op], fresh_bytes[op], now - received_ns);
                    fresh[op] = fresh_bytes[op] = 0;
                }
            if (looks == 1) received_ns = now; /* it was looked at while the next request was polled for */
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

static double nothing[PAIRS], counter[PAIRS], clocked[PAIRS];

#define LINE(kind, requests, looks)                                                                       \
    do {                                                                                                  \
        for (int pair = 0; pair < PAIRS; pair++) {                                                        \
            nothing[pair] = measure(requests, 0);                                                         \
            nbdtarget_use_rate(rate);                                                                     \
            counter[pair] = measure(requests, looks) - nothing[pair];                                     \
            nbdtarget_use_rate(NULL);                                                                     \
            clocked[pair] = measure(requests, looks) - nothing[pair];                                     \
        }                                                                                                 \
        printf("%s %d %.1f %.1f %.0f\n", kind, requests, median(counter), median(clocked), median(nothing)); \
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
    LINE("single", 1, 2);
    LINE("polled", 1, 1);
    LINE("batch", 8, 2);
    LINE("batch", 16, 2);
    return 0;
}
