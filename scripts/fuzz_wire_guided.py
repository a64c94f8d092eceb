# SPDX-License-Identifier: Apache-2.0
"""`make fuzz-wire-guided`: as `make fuzz-wire`, but a fuzzer that looks which code runs chooses the conversations.

    make fuzz-wire-guided [SECONDS=60] [ARGS="--only 'server handshake'"]

It needs atheris, which is in no lock file: `.venv/bin/pip install atheris`. Each fuzzer of `tests/support/wire_fuzz.py` runs for SECONDS. It begins
with the corpus of `tests/support/wire_corpus`, and what reaches code that was not reached before is added to that. Then the corpus is
made as small as it can be without reaching less. The gate replays it.

Exit status: 0 if every case ended as it must; 1 if one did not: it is in the corpus then, so that the gate fails until
it is mended; 2 if atheris is missing.
"""

import argparse
import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final

import nbdtarget_protocol
from nbdtarget import server
from tests.support.wire_bytes import BytesRandom, read_corpus, write_corpus
from tests.support.wire_fuzz import FUZZERS

__all__ = ["main"]

INSTRUMENTED: Final = ["nbdtarget_protocol", "nbdtarget.server"]
PATHS: Final = tuple(package.__path__[0] for package in (nbdtarget_protocol, server))
BYTES_MAX: Final = 512  # of one case


def run_child(fuzzer: str, arguments: Sequence[str]) -> None:
    """Be the fuzzer: does not return. Args: arguments: of libFuzzer."""
    import atheris  # type: ignore[import-untyped, unused-ignore]  # imported here, because it need not be installed

    for name in [*sys.modules]:
        if name.startswith((*INSTRUMENTED, "tests.support.")):
            del sys.modules[name]  # it is imported again, with counters
    with atheris.instrument_imports(include=INSTRUMENTED):
        from tests.support.wire_fuzz import FUZZERS as TARGETS

    target = TARGETS[fuzzer]

    def one(data: bytes) -> None:
        target(BytesRandom(data))

    atheris.Setup([sys.argv[0], *arguments], one)
    atheris.Fuzz()


def child(fuzzer: str, *arguments: str) -> int:
    """Run the fuzzer in a process of its own; return its exit status."""
    command = [sys.executable, "-m", "scripts.fuzz_wire_guided", "--child", fuzzer]
    done = subprocess.run([*command, "--", *arguments], capture_output=True, text=True)
    lines = done.stderr.splitlines() + done.stdout.splitlines()
    shown = lines if done.returncode else [it for it in lines if "DONE" in it]
    print("\n".join(shown), flush=True)
    return done.returncode


def _lines_of(fuzzer: str, case: bytes) -> set[tuple[str, int, int]]:
    """Which line of the instrumented packages ran after which other one of its file."""
    found: set[tuple[str, int, int]] = set()

    def trace(frame: FrameType, event: str, _: object) -> Any:
        path = frame.f_code.co_filename
        if not path.startswith(PATHS):
            return None
        before = 0

        def line(frame: FrameType, event: str, _: object) -> Any:
            nonlocal before
            if event == "line":
                found.add((path, before, frame.f_lineno))
                before = frame.f_lineno
            return line

        return line

    sys.settrace(trace)
    try:
        FUZZERS[fuzzer](BytesRandom(case))
    finally:
        sys.settrace(None)
    return found


def reduced(fuzzer: str, cases: Iterable[bytes]) -> list[bytes]:
    """Return those of `cases`, short ones first, of which each runs something that those before it do not."""
    seen: set[tuple[str, int, int]] = set()
    kept = []
    for case in sorted(cases, key=lambda case: (len(case), case)):
        lines = _lines_of(fuzzer, case)
        if not lines <= seen:
            seen |= lines
            kept.append(case)
    return kept


def fuzz(fuzzer: str, seconds: float) -> bool:
    """Run one fuzzer, and renew its corpus; return whether every case ended as it must."""
    with tempfile.TemporaryDirectory() as folder:
        grown, failed = Path(folder) / "grown", Path(folder) / "failed"
        grown.mkdir()
        failed.mkdir()
        for nr, case in enumerate(read_corpus(fuzzer)):
            (grown / f"{nr}").write_bytes(case)
        status = child(
            fuzzer,
            f"-max_total_time={seconds:.0f}",
            f"-max_len={BYTES_MAX}",
            "-timeout=120",
            f"-artifact_prefix={failed}/",
            str(grown),
        )
        # A case that was slow is told, too, but every case is slow on a machine that has much else to do.
        failures = [
            each.read_bytes()
            for each in failed.iterdir()
            if not each.name.startswith("slow-unit")
        ]
        cases = [each.read_bytes() for each in grown.iterdir()]
        cases = reduced(fuzzer, cases) if not status else cases
        write_corpus(fuzzer, [*cases, *failures])
        print(f"{fuzzer}: {len(cases)} cases are kept, {len(failures)} failed")
        return not status


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="make fuzz-wire-guided")
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", choices=list(FUZZERS), help="this fuzzer alone")
    parser.add_argument("--child", choices=list(FUZZERS), help=argparse.SUPPRESS)
    parser.add_argument("rest", nargs="*", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("atheris") is None:
        print(
            "make fuzz-wire-guided: atheris is missing: .venv/bin/pip install atheris",
            file=sys.stderr,
        )
        return 2
    if options.child:
        run_child(options.child, options.rest)
    fuzzers = [options.only] if options.only else FUZZERS
    failed = [each for each in fuzzers if not fuzz(each, options.seconds)]
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
