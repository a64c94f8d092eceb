# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-wire`: damaged and unlikely conversations in the NBD protocol, for as long as you like.

    make fuzz-wire [SECONDS=60] [SEED=0] [CASES=N] [ARGS='--only FUZZER' --messages N --name-seeds]

`tests/support/wire_fuzz.py` says what each seed becomes, and what must come of it. Seeds count up from SEED, and each of
them goes through all fuzzers, or through the one that `--only` names. The first case that fails ends the run: its seed, the
command that replays it, and what happened. With `--messages` the run goes on until so many messages (options, answers to options, requests and
replies) were made, however long that takes. A line tells each minute how far the run is, and Ctrl-C ends it with what it has counted. `--name-seeds` prints the first seed of each outcome, in the form of
`tests/support/wire_seeds.py`, which the gate replays.

Exit status: 0 if every case ended as it must, else 1; 130 after Ctrl-C.
"""

import argparse
import random
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence

from tests.support.wire_fuzz import FUZZERS

__all__ = ["main"]

PROGRESS_S = 60.0


class Run:
    """Cases, and how they ended."""

    def __init__(self, fuzzers: Sequence[str], seed: int) -> None:
        self.fuzzers = fuzzers
        self.seed = seed  # the next one
        self.begun_s = time.monotonic()
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.first: dict[tuple[str, str], int] = {}
        self.nr_messages: Counter[str] = Counter()

    def cases(self, options: argparse.Namespace) -> bool:
        """Run seed after seed for as long as the options say; tell whether all went well."""
        told_s = self.begun_s
        while self.seed - options.seed != options.cases and _goes_on(options, self):
            if not self.case(self.seed):
                return False
            self.seed += 1
            if time.monotonic() - told_s >= PROGRESS_S:
                told_s = time.monotonic()
                nr_messages = sum(self.nr_messages.values())
                print(f"seed {self.seed}: {nr_messages} messages", file=sys.stderr)
        return True

    def case(self, seed: int) -> bool:
        """Run one seed through all fuzzers; tell whether all went well."""
        for name in self.fuzzers:
            try:
                ended = FUZZERS[name](random.Random(seed))
            except Exception:
                only = f" ARGS=\"--only '{name}'\""
                print(
                    f"FAILED {name}, seed {seed}; again:"
                    f" make fuzz-wire SEED={seed} CASES=1{only}"
                )
                traceback.print_exc(file=sys.stdout)
                return False
            outcome = name, ended.outcome
            self.outcomes[outcome] += 1
            self.nr_messages[name] += ended.nr_messages
            self.first.setdefault(outcome, seed)
        return True

    def print_outcomes(self) -> None:
        for (name, outcome), count in self.outcomes.most_common():
            print(f"{count:9}  {name}: {outcome}")

    def print_seeds(self) -> None:
        for name in self.fuzzers:
            print(f'    "{name}": {{')
            for (of, outcome), seed in self.first.items():
                if of == name:
                    print(f'        "{outcome}": {seed},')
            print("    },")


def _goes_on(options: argparse.Namespace, run: Run) -> bool:
    if options.messages is not None:
        return sum(run.nr_messages.values()) < int(options.messages)
    return bool(options.cases) or time.monotonic() - run.begun_s < options.seconds


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-wire")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None)
    parser.add_argument("--messages", type=int, default=None)
    parser.add_argument("--only", choices=sorted(FUZZERS), help="this fuzzer alone")
    parser.add_argument("--name-seeds", action="store_true", help="print named seeds")
    options = parser.parse_args(arguments)
    if options.cases is not None and options.cases < 1:
        parser.error("--cases must be at least 1")
    run = Run([options.only] if options.only else list(FUZZERS), options.seed)
    status = 0
    try:
        if not run.cases(options):
            return 1
    except KeyboardInterrupt:
        print(f"interrupted in seed {run.seed}")
        status = 130
    if options.name_seeds:
        run.print_seeds()
        return status
    run.print_outcomes()
    took_s = time.monotonic() - run.begun_s
    for name, nr in run.nr_messages.items():
        print(f"{nr:9}  messages: {name}")
    if run.seed > options.seed:
        print(
            f"seeds {options.seed} to {run.seed - 1}: every case ended as it must ({took_s:.0f} s)"
        )
    return status


if __name__ == "__main__":
    sys.exit(main())
