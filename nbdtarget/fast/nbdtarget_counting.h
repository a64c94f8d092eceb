/* SPDX-License-Identifier: Apache-2.0 */
/* How the compiled path counts what it answers. `scripts/bench_counting.c` measures what that costs, with this code.
 *
 * Requests and bytes are always counted exactly. The time of a batch needs two looks at the clock, and right after a system call these cost
 * more than a thousandth of a short request. So only some batches are timed:
 *
 *     all of them while the server is not busy: EXACT_EACH_NS that pass allow one more, and EXACT_MAX may be saved up
 *     otherwise one of about 16, after a random number of others, so that no pattern of requests is always met or always missed
 *
 * A batch that was not timed counts with the time of the last one that was, of the same connection and operation; in a sum over many
 * batches this is right. What may take long is not left to chance: the caller says so (`nbdtarget_time_anyway`), such a batch is timed,
 * and its time never stands for that of others.
 *
 * Where the caller knows the time for another reason, a batch is timed with that. The clock is not looked at to see whether time has
 * passed: this is seen when a batch is timed, or when the numbers are read (`nbdtarget_time_passed`).
 *
 * A connection belongs to one thread. Loops in several threads share the sampling, and may lose one of its steps to each other, which
 * changes only what is timed. */
#ifndef NBDTARGET_COUNTING_H
#define NBDTARGET_COUNTING_H

#include "nbdtarget_clock.h"

enum {
    NBDTARGET_NR_BOUNDS = 12,
    NBDTARGET_NR_COUNTED = 3, /* READ, WRITE (their numbers in NBD) and FLUSH */
    NBDTARGET_COUNTED_FLUSH = 2,
    NBDTARGET_EXACT_EACH_NS = 1000000, /* a thousand batches a second */
    NBDTARGET_EXACT_MAX = 1000,
    NBDTARGET_GAP_SHIFT = 27, /* of a random number: 0 to 31 batches lie between two that are timed */
};

/* Up to which time a request counts in which bucket: those of `nbdtarget.server.traffic`, which a test compares. */
static const int64_t nbdtarget_bounds_ns[NBDTARGET_NR_BOUNDS] = {
    25000, 50000, 100000, 250000, 500000, 1000000, 2500000, 5000000, 10000000, 50000000, 250000000, 1000000000,
};

/* Which batches are timed, of all connections. */
struct nbdtarget_sampling {
    uint32_t nr_untimed; /* so many are not, and then one is */
    uint32_t nr_exact;   /* so many more may be timed one after the other */
    int64_t since_ns;    /* what has passed since then is not in `nr_exact` yet */
    uint32_t random;
};

/* The times of one operation. */
struct nbdtarget_times {
    uint64_t taken_ns;
    uint64_t buckets[NBDTARGET_NR_BOUNDS + 1];
    int64_t usual_ns; /* the time of the last batch that stands for others */
    int usual_bucket;
};

/* Of one connection: what was answered. What a batch that is not timed needs comes first: little memory, for it is cold after a system call. */
struct nbdtarget_counter {
    int64_t received_ns; /* of the batch that was received last; 0: it is not timed */
    uint64_t nr[NBDTARGET_NR_COUNTED]; /* the caller adds to these when it has served a request */
    uint64_t nr_bytes[NBDTARGET_NR_COUNTED];
    uint64_t nr_before[NBDTARGET_NR_COUNTED]; /* `nr` when the batch was received */
    uint8_t knows_usual; /* a batch that stands for others has been timed; `usual_ns` of an operation that it did not have is its time, too */
    uint8_t is_chosen;   /* the batch is timed because it was its turn */
    uint8_t is_usual;    /* it has nothing that may take long */
    uint64_t nr_added[NBDTARGET_NR_COUNTED]; /* so many have their times in `times`; those of batches that were not timed follow later */
    struct nbdtarget_times times[NBDTARGET_NR_COUNTED];
};

static inline void nbdtarget_time_passed(struct nbdtarget_sampling *sampling, int64_t now) {
    int64_t nr = (now - sampling->since_ns) / NBDTARGET_EXACT_EACH_NS;
    if (!nr) return;
    sampling->nr_untimed = 0;
    if (nr < 0) nr = 0; /* the machine was suspended, and its counter began again */
    if (nr + sampling->nr_exact <= NBDTARGET_EXACT_MAX) {
        sampling->nr_exact += (uint32_t)nr;
        sampling->since_ns = nr ? sampling->since_ns + nr * NBDTARGET_EXACT_EACH_NS : now;
    } else {
        sampling->nr_exact = NBDTARGET_EXACT_MAX;
        sampling->since_ns = now;
    }
}

/* Whether it is the turn of the batch that was received now; `nbdtarget_was_chosen` follows then. */
static inline int nbdtarget_is_chosen(struct nbdtarget_sampling *sampling) {
    uint32_t nr = __atomic_load_n(&sampling->nr_untimed, __ATOMIC_RELAXED); /* once: it must not go below 0 */
    if (!nr) return 1;
    sampling->nr_untimed = nr - 1;
    return 0;
}

static inline void nbdtarget_was_chosen(struct nbdtarget_sampling *sampling, int64_t now) {
    uint32_t nr;
    nbdtarget_time_passed(sampling, now);
    nr = __atomic_load_n(&sampling->nr_exact, __ATOMIC_RELAXED);
    if (nr) {
        sampling->nr_exact = nr - 1;
        return;
    }
    sampling->random = sampling->random * UINT32_C(1664525) + UINT32_C(1013904223);
    sampling->nr_untimed = sampling->random >> NBDTARGET_GAP_SHIFT;
}

static inline int nbdtarget_bucket(int64_t taken_ns) {
    int bucket = 0;
    while (bucket < NBDTARGET_NR_BOUNDS && taken_ns > nbdtarget_bounds_ns[bucket]) bucket++;
    return bucket;
}

static inline void nbdtarget_add_times(struct nbdtarget_counter *counter, int op, uint64_t nr, int64_t taken_ns, int bucket) {
    counter->nr_added[op] += nr;
    counter->times[op].taken_ns += nr * (uint64_t)taken_ns;
    counter->times[op].buckets[bucket] += nr;
}

/* Count a request that belongs to no batch. */
static inline void nbdtarget_count_one(struct nbdtarget_counter *counter, int op, uint64_t nr_bytes, int64_t taken_ns) {
    if (taken_ns < 0) taken_ns = 0; /* the counter of the processor began again */
    counter->nr[op] += 1;
    counter->nr_bytes[op] += nr_bytes;
    nbdtarget_add_times(counter, op, 1, taken_ns, nbdtarget_bucket(taken_ns));
}

/* A batch was received. `since`: at that time, which the caller knows anyway; 0: it does not know. */
static inline void nbdtarget_begin_batch(struct nbdtarget_counter *counter, struct nbdtarget_sampling *sampling, int64_t since) {
    for (int op = 0; op < NBDTARGET_NR_COUNTED; op++) counter->nr_before[op] = counter->nr[op];
    counter->is_usual = 1;
    counter->is_chosen = !since && (!counter->knows_usual || nbdtarget_is_chosen(sampling));
    counter->received_ns = counter->is_chosen ? nbdtarget_now_ns() : since;
}

/* The batch has something that may take long, or has taken long. `since`: since then at the latest; 0: since now. */
static inline void nbdtarget_time_anyway(struct nbdtarget_counter *counter, int64_t since) {
    counter->is_usual = 0;
    if (!counter->received_ns) counter->received_ns = since ? since : nbdtarget_now_ns();
}

/* Add the times of what was answered up to `nr` requests of each operation, and was not timed. */
static inline void nbdtarget_add_untimed(struct nbdtarget_counter *counter, const uint64_t *nr) {
    for (int op = 0; op < NBDTARGET_NR_COUNTED; op++) {
        uint64_t more = nr[op] - counter->nr_added[op];
        if (more) nbdtarget_add_times(counter, op, more, counter->times[op].usual_ns, counter->times[op].usual_bucket);
    }
}

static void nbdtarget_add_timed(struct nbdtarget_counter *counter, struct nbdtarget_sampling *sampling, int64_t now) {
    int64_t taken_ns = now > counter->received_ns ? now - counter->received_ns : 0;
    int bucket = nbdtarget_bucket(taken_ns);
    int is_usual = counter->is_usual && (counter->nr[0] != counter->nr_before[0] || counter->nr[1] != counter->nr_before[1]);
    nbdtarget_add_untimed(counter, counter->nr_before);
    for (int op = 0; op < NBDTARGET_NR_COUNTED; op++) {
        uint64_t nr = counter->nr[op] - counter->nr_before[op];
        if (is_usual && (nr || !counter->knows_usual)) {
            counter->times[op].usual_ns = taken_ns;
            counter->times[op].usual_bucket = bucket;
        }
        if (nr) nbdtarget_add_times(counter, op, nr, taken_ns, bucket);
    }
    counter->knows_usual |= is_usual;
    if (counter->is_chosen)
        nbdtarget_was_chosen(sampling, now);
    else
        nbdtarget_time_passed(sampling, now);
}

/* All that was answered of the batch has taken until now. Returns the time; 0: the batch was not timed. */
static inline int64_t nbdtarget_end_batch(struct nbdtarget_counter *counter, struct nbdtarget_sampling *sampling) {
    int64_t now;
    if (!counter->received_ns) return 0;
    now = nbdtarget_now_ns();
    nbdtarget_add_timed(counter, sampling, now);
    return now;
}

#endif
