# SPDX-License-Identifier: Apache-2.0
"""`make fuzz`: metadata that no version of the program writes, for as long as you like.

    make fuzz [SECONDS=60] [SEED=0] [CASES=N]

Each case is an image of a clone and one of a cache (and a chain of records) that is damaged, or
lies under valid digests, as its seed says; `tests/support/metadata/fuzz.py` and `fuzz_cache.py` tell how, and
what must come of it. Seeds count up from
SEED. The first case that fails ends the run: its seed, how to see it again, and what happened.

Exit status: 0 if every case ended as it must, else 1.
"""

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Sequence

from tests.support.metadata.fuzz import fuzz_chain, fuzz_image
from tests.support.metadata.fuzz_cache import fuzz_cache_image

__all__ = ["main"]

FUZZERS = {"image": fuzz_image, "cache image": fuzz_cache_image, "chain": fuzz_chain}


def run_cases(seed: int, seconds: float, cases: int | None) -> bool:
    """Run cases until the time or their number is up; tell whether all went well."""
    begun = time.monotonic()
    found: Counter[str] = Counter()
    at = seed
    while at - seed != cases and (cases or time.monotonic() - begun < seconds):
        for name, fuzz in FUZZERS.items():
            try:
                found[f"{name}: {fuzz(at)}"] += 1
            except Exception:
                print(f"FAILED {name}, seed {at}; again: make fuzz SEED={at} CASES=1")
                traceback.print_exc(file=sys.stdout)
                return False
        at += 1
    for outcome, count in found.most_common():
        print(f"{count:9}  {outcome}")
    took_s = time.monotonic() - begun
    print(f"seeds {seed} to {at - 1}: every case ended as it must ({took_s:.0f} s)")
    return True


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cases", type=int, default=None)
    options = parser.parse_args(arguments)
    if options.cases is not None and options.cases < 1:
        parser.error("--cases must be at least 1")
    return 0 if run_cases(options.seed, options.seconds, options.cases) else 1


if __name__ == "__main__":
    sys.exit(main())
