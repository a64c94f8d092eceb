// SPDX-License-Identifier: Apache-2.0
/* What counting costs on the compiled path, for `bench_metrics.py`: the same statements as in nbdtarget/fast/nbdtarget_fast.pyx
 * (`count`, `_count` and the looks at the clock), in a loop by themselves. There they overlap with system calls; so this is
 * the most that they can cost. It prints the nanoseconds of processor time of a batch, and of each request of it. */
#include <stdint.h>
#include <stdio.h>
#include <time.h>

enum { NR_BOUNDS = 12, ROUNDS = 4000000 };

static const int64_t bounds_ns[NR_BOUNDS] = {25000,   50000,   100000,   250000,   500000,    1000000,
                                             2500000, 5000000, 10000000, 50000000, 250000000, 1000000000};

struct counts {
    uint64_t nr, nr_bytes, taken_ns, buckets[NR_BOUNDS + 1];
};

static struct counts counts[2];
static uint64_t fresh[2], fresh_bytes[2];
static int64_t received_ns;

static int64_t look(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void count(struct counts *into, uint64_t nr, uint64_t nr_bytes, int64_t taken_ns) {
    int bucket = 0;
    while (bucket < NR_BOUNDS && taken_ns > bounds_ns[bucket]) bucket++;
    into->nr += nr;
    into->nr_bytes += nr_bytes;
    into->taken_ns += nr * (uint64_t)taken_ns;
    into->buckets[bucket] += nr;
}

/* Returns the nanoseconds of processor time of one round. `looks`: at the clock; `requests`: of the batch. */
static double measure(int looks, int requests) {
    int64_t begun = look(CLOCK_THREAD_CPUTIME_ID);
    for (int round = 0; round < ROUNDS; round++) {
        int64_t now = received_ns + 20000;
        if (looks > 0) received_ns = look(CLOCK_MONOTONIC);
        for (int nr = 0; nr < requests; nr++) {
            fresh[0] += 1;
            fresh_bytes[0] += 4096;
            __asm__ volatile("" ::: "memory"); /* each for itself, as on the path */
        }
        if (looks > 1) now = look(CLOCK_MONOTONIC);
        for (int op = 0; op < 2; op++)
            if (fresh[op] || fresh_bytes[op]) {
                count(&counts[op], fresh[op], fresh_bytes[op], now - received_ns);
                fresh[op] = fresh_bytes[op] = 0;
            }
        __asm__ volatile("" ::: "memory");
    }
    return (double)(look(CLOCK_THREAD_CPUTIME_ID) - begun) / ROUNDS;
}

static double least(int looks, int requests) {
    double found = measure(looks, requests);
    for (int again = 0; again < 4; again++) {
        double next = measure(looks, requests);
        if (next < found) found = next;
    }
    return found;
}

int main(void) {
    double batch = least(2, 1), many = least(2, 33), polled = least(1, 1);
    double request = (many - batch) / 32;
    printf("%.1f %.1f %.2f\n", batch - request, polled - request, request);
    return 0;
}
