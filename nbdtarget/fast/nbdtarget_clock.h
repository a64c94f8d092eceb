/* SPDX-License-Identifier: Apache-2.0 */
/* `nbdtarget_now_ns`: the time in nanoseconds, for differences only.
 *
 * A look at the clock takes about 100 ns right after a system call, for the code and the data of it are cold then; a look at the processor's
 * counter takes about 15. So where the kernel itself takes its time from that counter (its clocksource is `tsc`: it has found it
 * to be constant, and equal on all processors), we do, too. Its rate is found by looking at both at two moments. What is
 * told then begins where the clock was, and differs from it later by a few millionths. Anywhere else it is the clock. */
#ifndef NBDTARGET_CLOCK_H
#define NBDTARGET_CLOCK_H

#include <stdint.h>
#include <time.h>

#if defined(__x86_64__)
#define NBDTARGET_HAS_TICKS 1
static inline uint64_t nbdtarget_ticks(void) { return __builtin_ia32_rdtsc(); }
#else
#define NBDTARGET_HAS_TICKS 0
static inline uint64_t nbdtarget_ticks(void) { return 0; }
#endif

enum {
    NBDTARGET_BASE_NS_MIN = 10000000, /* between the two moments: an error of 50 ns is 5 millionths of it */
    NBDTARGET_SLEPT_NS_MAX = 1000000, /* while the machine sleeps, the counter may go on and the clock does not */
};

/* Both, at one moment. */
struct nbdtarget_moment {
    uint64_t ticks;
    int64_t ns;
    int64_t slept_ns; /* how long the machine has slept since it was started */
};

/* From `since` on a tick takes so many nanoseconds / 2^32. */
struct nbdtarget_rate {
    struct nbdtarget_moment since;
    int64_t tick_ns_32;
};

static const struct nbdtarget_rate *nbdtarget_rate_used; /* NULL: the clock */

static inline int64_t nbdtarget_look(clockid_t clock) {
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

static inline int64_t nbdtarget_ns_at(const struct nbdtarget_rate *rate, uint64_t ticks) {
    __int128 passed = (int64_t)(ticks - rate->since.ticks); /* more than 64 bits: for years */
    return rate->since.ns + (int64_t)(passed * rate->tick_ns_32 >> 32);
}

static inline int64_t nbdtarget_now_ns(void) {
    const struct nbdtarget_rate *rate = __atomic_load_n(&nbdtarget_rate_used, __ATOMIC_ACQUIRE);
    return rate ? nbdtarget_ns_at(rate, nbdtarget_ticks()) : nbdtarget_look(CLOCK_MONOTONIC);
}

static inline void nbdtarget_use_rate(const struct nbdtarget_rate *rate) {
    __atomic_store_n(&nbdtarget_rate_used, rate, __ATOMIC_RELEASE);
}

/* Of several looks it takes the one that was interrupted least. */
static inline struct nbdtarget_moment nbdtarget_moment_now(void) {
    struct nbdtarget_moment found = {0, 0, 0};
    uint64_t least = UINT64_MAX;
    for (int nr = 0; nr < 16; nr++) {
        uint64_t before = nbdtarget_ticks();
        int64_t ns = nbdtarget_look(CLOCK_MONOTONIC);
        uint64_t taken = nbdtarget_ticks() - before;
        if (taken < least) {
            least = taken;
            found.ticks = before + taken / 2;
            found.ns = ns;
        }
    }
    found.slept_ns = nbdtarget_look(CLOCK_BOOTTIME) - nbdtarget_look(CLOCK_MONOTONIC);
    return found;
}

/* Returns 0 if nothing can be said of the rate: the moments are too near, or the machine has slept between them. */
static inline int nbdtarget_rate_of(struct nbdtarget_moment first, struct nbdtarget_moment last,
                                    struct nbdtarget_rate *rate) {
    int64_t slept_ns = last.slept_ns - first.slept_ns;
    if (last.ns - first.ns < NBDTARGET_BASE_NS_MIN || last.ticks <= first.ticks) return 0;
    if (slept_ns > NBDTARGET_SLEPT_NS_MAX || slept_ns < -NBDTARGET_SLEPT_NS_MAX) return 0;
    rate->since = last;
    rate->tick_ns_32 = (int64_t)(((__int128)(last.ns - first.ns) << 32) / (last.ticks - first.ticks));
    return rate->tick_ns_32 > 0;
}

#endif
