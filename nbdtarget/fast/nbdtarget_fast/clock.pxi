# SPDX-License-Identifier: Apache-2.0
"""What time it is: from the processor's counter where that can be trusted, see `nbdtarget_clock.h`, otherwise from the clock.

This is a part of `nbdtarget_fast`; see the head of `nbdtarget_fast.pyx`.
"""

cdef extern from "nbdtarget_clock.h" nogil:
    struct Moment "nbdtarget_moment":
        uint64_t ticks
        int64_t ns
        int64_t slept_ns
    struct Rate "nbdtarget_rate":
        Moment since
    const bint HAS_TICKS "NBDTARGET_HAS_TICKS"
    int64_t now_ns "nbdtarget_now_ns"()
    int64_t ns_at "nbdtarget_ns_at"(const Rate *rate, uint64_t ticks)
    Moment moment_now "nbdtarget_moment_now"()
    bint rate_of "nbdtarget_rate_of"(Moment first, Moment last, Rate *rate)
    void use_rate "nbdtarget_use_rate"(const Rate *rate)

CLOCKSOURCE = "/sys/devices/system/clocksource/clocksource0/current_clocksource"

cdef Moment imported = moment_now()
cdef Rate found_rate
cdef bint is_rate_found = False
cdef Rate skewed_rate


def choose_clock(clocksource=CLOCKSOURCE):
    """From now on take the time from the processor's counter, if the kernel does so now. See `nbdtarget_clock.h`.

    The kernel may cease to trust the counter at any time. So this is called for each new connection.

    Args: clocksource: the file in which the kernel says where it takes the time from.
    Returns: whether it is the counter.
    """
    global is_rate_found
    name = ""
    if HAS_TICKS:
        try:
            with open(clocksource) as file:
                name = file.read().strip()
        except OSError:
            pass  # some containers do not have it: then the clock is used
    if name == "tsc" and not is_rate_found:
        is_rate_found = rate_of(imported, moment_now(), &found_rate)
    use_rate(&found_rate if name == "tsc" and is_rate_found else NULL)
    return name == "tsc" and is_rate_found


def clock_ns():
    """For tests: the time, as requests are measured with it."""
    return now_ns()


def skew_clock(int64_t ahead_ns):
    """For tests: let the processor's counter tell the time, and be so far ahead of the clock, until `choose_clock` is called.

    Returns: whether there is such a counter, whose rate is known.
    """
    if not HAS_TICKS or not rate_of(imported, moment_now(), &skewed_rate):
        return False
    skewed_rate.since.ns += ahead_ns
    use_rate(&skewed_rate)
    return True


def ns_of_ticks(first, last, uint64_t ticks):
    """For tests: what the clock shows at `ticks`, if at two moments (ticks, ns, ns that the machine has slept) both were looked at; None:
    nothing can be said."""
    cdef Moment one, other
    cdef Rate rate
    one.ticks, one.ns, one.slept_ns = first
    other.ticks, other.ns, other.slept_ns = last
    return ns_at(&rate, ticks) if rate_of(one, other, &rate) else None
