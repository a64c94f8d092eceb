# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-fast`: the compiled fast path under AddressSanitizer, against messages of every kind.

    make fuzz-fast [ARGS='--messages 10000000 --seed 1 --plain']

The extension module is built with AddressSanitizer into a temporary folder, and a second Python with its
library preloaded sends random batches over a socket pair: good requests, requests with random fields, cut
ones, and random bytes, through flat routes, bitmaps and tables, with small buffers and large ones, with
files that are too short, and peers that do not read. In most rounds some READs are taken for misses of the page cache, and
io_uring carries them out, if it is allowed; planes are released while it does. In others some READs, or all, are sent from windows, a few of which are given back
between two turns. Some files fail, and some are truncated while they are read (`fuzz_fast_files.py`).

There are five kinds of rounds, one after the other: `Plane.turn` is called; the `Receiver` is called instead, as the event loop does
(`fuzz_fast_receiver.py`); several servers answer the READs of bulk copies in good and in bad ways (`fuzz_fast_copies.py`); files are
synced (`fuzz_fast_syncs.py`); and `Plane.turn` is called for a peer that talks in TLS (`fuzz_fast_tls.py`).

Messages that count: a request that the compiled code has taken, served or left to Python; a READ of a copy that was answered; a sync. Bytes sent and
dropped behind a broken message do not count.

The first memory error ends the run with AddressSanitizer's report; so does a wrong reply, with the seed
of its round and the command that repeats it. `--plain` leaves the sanitizer out.

Exit status: 0 if nothing was found, else 1.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from scripts.build_fast import BuildError, build, compiler
from scripts.fuzz_fast_copies import CopyRound
from scripts.fuzz_fast_plane import Round
from scripts.fuzz_fast_receiver import ReceiverRound
from scripts.fuzz_fast_syncs import SyncRound
from scripts.fuzz_fast_tls import TlsRound

__all__ = ["main"]

# Kinds of rounds, and how many messages one is of: a READ of a copy takes as long as ten of the others, a sync even longer.
ROUNDS: Final = (
    (Round, 10_000),
    (ReceiverRound, 10_000),
    (CopyRound, 300),
    (SyncRound, 30),
    (TlsRound, 5_000),
)
INSIDE: Final = "NBDTARGET_FUZZ_FAST"  # set in the second Python


def run_rounds(seed: int, messages: int) -> int:
    """Run rounds until so many messages count. Returns the exit status."""
    begun, counts = time.monotonic(), [0] * len(ROUNDS)
    with tempfile.TemporaryDirectory() as folder:
        at = seed
        while sum(counts) < messages:
            # AddressSanitizer ends the process: what was under way is on the screen then.
            print(f"\rround {at}: {sum(counts)} messages", end="", flush=True)
            kind = at % len(ROUNDS)
            make, nr = ROUNDS[kind]
            it = make(at, Path(folder))
            try:
                counts[kind] += it.run(min(nr, messages))
            except Exception:
                print(
                    f"\nFAILED; again: make fuzz-fast ARGS='--seed {at} --messages 1'"
                )
                raise
            finally:
                it.close()
            at += 1
    took_s = time.monotonic() - begun
    kinds = zip(counts, ROUNDS, strict=True)
    each = ", ".join(f"{nr} {kind.__name__}" for nr, (kind, _) in kinds)
    print(
        f"\rrounds {seed} to {at - 1}: {sum(counts)} messages ({each}), no error ({took_s:.0f} s)"
    )
    return 0


def sanitizer_library() -> str:
    """Return the library of AddressSanitizer that belongs to the C compiler. Raises: BuildError."""
    done = subprocess.run(
        [compiler()[0], "-print-file-name=libasan.so"], capture_output=True, text=True
    )
    library = done.stdout.strip()
    if not os.path.isabs(library):
        raise BuildError("the C compiler has no library of AddressSanitizer")
    return library


def run_inside(arguments: Sequence[str], *, plain: bool) -> int:
    """Build the module apart, and run this program again with it."""
    with tempfile.TemporaryDirectory() as folder:
        environment = {**os.environ, INSIDE: "1", "PYTHONPATH": folder}
        if not plain:
            os.environ["CFLAGS"] = "-O1 -g -fsanitize=address -fno-omit-frame-pointer"
            # Python itself frees little of what it allocated when it ends.
            environment["ASAN_OPTIONS"] = "detect_leaks=0:abort_on_error=0:exitcode=1"
            environment["LD_PRELOAD"] = sanitizer_library()
            environment["PYTHONMALLOC"] = "malloc"
        build(Path(folder))
        command = [sys.executable, "-m", "scripts.fuzz_fast", *arguments]
        return subprocess.run(command, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-fast", description=__doc__)
    parser.add_argument("--messages", type=int, default=10_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain", action="store_true", help="without AddressSanitizer")
    options = parser.parse_args()
    if os.environ.get(INSIDE):
        return run_rounds(options.seed, options.messages)
    try:
        return run_inside(sys.argv[1:], plain=options.plain)
    except BuildError as error:
        print(f"make fuzz-fast: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
