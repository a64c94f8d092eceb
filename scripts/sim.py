# SPDX-License-Identifier: Apache-2.0
"""Run the whole server in memory, cut its power a thousand times a minute, check every answer.

    make sim                 seeds for a minute, on two processes
    make sim SECONDS=600     for as long as that
    make sim CRASHES=5000    until there were so many crashes
    make sim SEED=n          one history again, exactly, with the events before a failure

A failing seed is printed at once, and the run goes on. Exit status 1 if any failed. Without
FROM the first seed is drawn from the clock, so that each run tries new ones.
"""

import argparse
import itertools
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator

from tests.sim.catalog import RIGS
from tests.sim.world import History, simulate

__all__ = ["main"]

PROCESSES = 2
CHUNK = 4  # seeds that a process takes at once


def main() -> int:
    """Do what the command line says; the exit status."""
    parser = argparse.ArgumentParser(prog="sim", description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, help="replay this one")
    parser.add_argument("--from", type=int, dest="first", help="the first seed")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--crashes", type=int, help="stop after so many")
    parser.add_argument("--rig", choices=list(RIGS), help="only this table")
    parser.add_argument("--processes", type=int, default=PROCESSES)
    options = parser.parse_args()
    if options.seed is not None:
        return _replay(options.seed, options.rig)
    first = int(time.time()) * 1000 if options.first is None else options.first
    return _run(first, options.seconds, options.crashes, options.rig, options.processes)


def _replay(seed: int, rig: str | None) -> int:
    history = simulate(seed, rig_name=rig)
    print("\n".join(history.events))
    print(
        f"seed {seed}: {history.rig}, {history.nr_lives} lives, {history.nr_crashes}"
        f" crashes, {history.nr_requests} requests, digest {history.digest}"
    )
    if history.failure is None:
        print("nothing is wrong")
        return 0
    print("".join(traceback.format_exception(history.failure)), end="")
    return 1


def _run(
    first: int,
    seconds: float,
    crashes: int | None,
    rig: str | None,
    processes: int,
) -> int:
    began_s = time.monotonic()
    failures = 0
    total = History(first, rig or "")
    nr_seeds = 0
    for history in _histories(first, rig, processes):
        nr_seeds += 1
        total.nr_crashes += history.nr_crashes
        total.nr_requests += history.nr_requests
        total.nr_steps += history.nr_steps
        total.simulated_s += history.simulated_s
        total.counts += history.counts
        if history.failure is not None:
            failures += 1
            again = f"make sim SEED={history.seed}" + (f" RIG={rig}" if rig else "")
            print(f"FAILED  {again}  ({history.rig}: {history.failure!r:.200})")
            sys.stdout.flush()
        is_late = time.monotonic() - began_s >= seconds
        if is_late if crashes is None else total.nr_crashes >= crashes:
            break
    took_s = time.monotonic() - began_s
    print(
        f"{nr_seeds} seeds from {first}: {total.nr_crashes} crashes,"
        f" {total.nr_requests} requests, {total.nr_steps} steps,"
        f" {total.simulated_s / 3600:.1f} simulated hours in {took_s:.0f} s"
        f" ({total.nr_crashes / took_s * 60:.0f} crashes a minute),"
        f" {total.counts['upgrades']} upgrades: {failures} failed"
    )
    return 1 if failures else 0


def _histories(first: int, rig: str | None, processes: int) -> Iterator[History]:
    """The histories of all seeds from `first` on, as they come."""
    work = ((seed, rig) for seed in itertools.count(first))
    if processes == 1:
        yield from map(_history, work)
        return
    with multiprocessing.Pool(processes) as pool:
        while True:
            chunk = list(itertools.islice(work, processes * CHUNK * 4))
            yield from pool.imap_unordered(_history, chunk, CHUNK)


def _history(work: tuple[int, str | None]) -> History:
    seed, rig = work
    history = simulate(seed, rig_name=rig)
    if history.failure is not None:
        # As it goes to another process: an exception may not survive the way.
        history.failure = RuntimeError(
            f"{type(history.failure).__name__}: {history.failure}"
        )
    history.events = ()
    return history


if __name__ == "__main__":
    sys.exit(main())
