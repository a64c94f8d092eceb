# SPDX-License-Identifier: Apache-2.0
"""How many requests were answered, and how long they took; see `nbdtarget_counting.h`.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`. The numbers themselves are fields of each `Plane`.
"""

cdef extern from "nbdtarget_counting.h" nogil:
    int NR_BOUNDS "NBDTARGET_NR_BOUNDS"
    int NR_COUNTED "NBDTARGET_NR_COUNTED"
    int COUNTED_FLUSH "NBDTARGET_COUNTED_FLUSH"
    const int64_t *bounds_ns "nbdtarget_bounds_ns"
    struct Sampling "nbdtarget_sampling":
        uint32_t nr_untimed
        uint32_t nr_exact
        int64_t since_ns
    struct Times "nbdtarget_times":
        uint64_t taken_ns
        uint64_t *buckets
        int64_t usual_ns
        int usual_bucket
    struct Counter "nbdtarget_counter":
        int64_t received_ns
        uint64_t *nr
        uint64_t *nr_bytes
        uint8_t knows_usual
        Times *times
    void time_passed "nbdtarget_time_passed"(Sampling *sampling, int64_t now)
    bint is_chosen "nbdtarget_is_chosen"(Sampling *sampling)
    void was_chosen "nbdtarget_was_chosen"(Sampling *sampling, int64_t now)
    int bucket_of "nbdtarget_bucket"(int64_t taken_ns)
    void count_one "nbdtarget_count_one"(Counter *counter, int op, uint64_t nr_bytes, int64_t taken_ns)
    void begin_batch "nbdtarget_begin_batch"(Counter *counter, Sampling *sampling, int64_t since)
    void time_anyway "nbdtarget_time_anyway"(Counter *counter, int64_t since)
    void add_untimed "nbdtarget_add_untimed"(Counter *counter, const uint64_t *nr)
    int64_t end_batch "nbdtarget_end_batch"(Counter *counter, Sampling *sampling)

BOUNDS_NS = tuple(bounds_ns[nr] for nr in range(NR_BOUNDS))

cdef Sampling sampling  # decides which batches of all connections are timed

# How many batches all Planes have received. The loop's thread counts them, or the thread of a Syncer while the loop stands still.
cdef int64_t nr_batches = 0


def batches_received():
    """Return how many times the Planes of this process have received something: a number that only grows."""
    return nr_batches


def chosen_batches(ends_ns):
    """For tests: return for each of these moments whether a batch that ends then is timed. When the first one ends, no timings are saved
    up (NBDTARGET_EXACT_MAX)."""
    cdef Sampling found
    cdef bint is_next
    memset(&found, 0, sizeof(found))
    found.since_ns = ends_ns[0]
    chosen = []
    for end_ns in ends_ns:
        is_next = is_chosen(&found)
        if is_next:
            was_chosen(&found, end_ns)
        chosen.append(is_next)
    return chosen
