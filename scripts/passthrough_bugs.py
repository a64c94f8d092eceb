# SPDX-License-Identifier: Apache-2.0
"""The two bugs of dm-cache's passthrough mode, by the steps that show them in the kernel.

    python -m scripts.passthrough_bugs [--dir DIR]

Both let a cache into passthrough, where nothing is written back, with a block that is newer than
the origin's. The next write to that block then goes to the origin alone, the cached copy is
given up, and what else it held is lost.

    unclean   a table that comes after a crash: which blocks are dirty is not recorded then
    preload   a table that was loaded while another one was live and clean, and is resumed later

The steps are those of the kernel's own commit messages: `dmsetup` is `nbdtarget` here, fio a client,
and the reset of the machine a SIGKILL. The third part is the first one with `dirty_log`, where it
is recorded which blocks may be dirty: only those stand in the way.

All that is told to the server is printed, with its answer; in the end there is a verdict for each
part, and the exit status is 0 if they are all good. Nothing is left behind.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from nbdtarget.common.units import SECTOR
from tests.support.plain_client import PlainClient, PlainClientError
from tests.support.processes import NBDTARGET, ServerProcess, StartError

__all__ = ["Bench", "Failed", "main"]

BLOCK: Final = 128 * SECTOR
PAGE: Final = 4096

# Offset and length of each part of the one disk, in sectors; as in the kernel's steps.
PARTS: Final = {
    "cmeta": (0, 8192),
    "cdata": (8192, 131072),
    "corig": (262144, 262144),
}
DISK_SIZE: Final = (262144 + 262144) * SECTOR

UNCLEAN: Final = "unable to resume into passthrough mode after unclean shutdown"
NOT_CLEAN: Final = "cannot enter passthrough mode unless all blocks are clean"

# Of what takes a second or two, on a machine that does nothing else.
PATIENCE_S: Final = 180.0
TRY_S: Final = 0.1
IDLE_S: Final = 3.0
IDLES_MAX: Final = 20


class Failed(Exception):
    """A step went otherwise than it should."""


class Bench:
    """One server, one disk in a file, and the tables on it.

    Args:
        work: an empty directory.
        features: of the cache's tables, beside their mode.
    """

    def __init__(self, work: Path, *features: str) -> None:
        self.work = work
        self.features = features
        self.disk = work / "disk"
        self.socket = work / "nbd"
        self.control = work / "control"
        self.disk.touch()
        os.truncate(self.disk, DISK_SIZE)
        self._server: ServerProcess | None = None

    # ---- the server ----

    def start(self) -> None:
        say("$ nbdtarget serve &")
        argv = [NBDTARGET, "serve", "--listen", f"unix:{self.socket}"]
        argv += ["--control", str(self.control)]
        sockets = [self.socket, self.control]
        self._server = ServerProcess(argv, sockets=sockets, log=self.work / "log")

    def kill(self) -> None:
        """A reset of the machine, for the cache: it gets no chance to record anything."""
        say("$ kill -9 $!")
        assert self._server is not None
        self._server.kill()
        self._server = None

    def stop(self) -> None:
        if self._server is not None:
            self._server.terminate()
            self._server = None

    # ---- the verbs ----

    def run(self, *words: str) -> str:
        """Run one of the verbs. Raises: Failed."""
        status, said = self._run(words)
        if status:
            raise Failed(f"{shlex.join(words)}: exit status {status}")
        return said

    def refused(self, text: str, *words: str) -> None:
        """Run a verb that must fail with this text. Raises: Failed."""
        status, said = self._run(words)
        if not status:
            raise Failed(f"{shlex.join(words)}: accepted")
        if text not in said:
            raise Failed(f"{shlex.join(words)}: {said}, and not: {text}")

    def accepted(self, unless: str, *words: str) -> bool:
        """Run a verb that may fail with the text `unless`; whether it did not. Raises: Failed: it fails otherwise."""
        status, said = self._run(words)
        if status and unless not in said:
            raise Failed(f"{shlex.join(words)}: exit status {status}")
        return not status

    def _run(self, words: Sequence[str]) -> tuple[int, str]:
        say(f"$ nbdtarget {shlex.join(words)}")
        ran = subprocess.run(
            [NBDTARGET, *words],
            env={**os.environ, "NBDTARGET_CONTROL": str(self.control)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
            check=False,
        )
        said = ran.stdout.strip()
        if said:
            say(f"    {said}")
        if ran.returncode:
            say(f"    -> exit status {ran.returncode}")
        return ran.returncode, said

    def create_parts(self) -> None:
        for name, (begin, length) in PARTS.items():
            self.run(
                "create", name, "--table", f"0 {length} linear {self.disk} {begin}"
            )

    def table(self, mode: str, policy: str = "smq 0") -> str:
        devices = " ".join(f"/dev/mapper/{name}" for name in PARTS)
        words = ("metadata2", mode, *self.features)
        sectors = BLOCK // SECTOR
        return (
            f"0 {PARTS['corig'][1]} cache {devices} {sectors}"
            f" {len(words)} {' '.join(words)} {policy}"
        )

    @property
    def writeback(self) -> str:
        """With the threshold that leaves dirty blocks dirty."""
        return self.table("writeback", "smq 2 migration_threshold 0")

    # ---- I/O ----

    def write(self, data: bytes) -> None:
        """Write data to the cache from its beginning, 4 KiB at a time."""
        with PlainClient(self.socket, "cache") as client:
            for at in range(0, len(data), PAGE):
                client.write(at, data[at : at + PAGE])

    def read(self, name: str) -> bytes:
        """Return the first block of a device."""
        with PlainClient(self.socket, name) as client:
            return client.read(0, BLOCK)

    def nr_dirty(self) -> int:
        """Field 14 of the status. Asking for it commits the mappings, not what is dirty."""
        return int(self.run("status", "cache").split()[13])

    def make_dirty(self, data: bytes) -> None:
        """Write the first block, until it is cached. Raises: Failed."""
        say(f"# write {len(data) >> 10} KiB, 4 KiB at a time, until the block is dirty")
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            self.write(data)
            if self.nr_dirty() == 1:
                return
            time.sleep(TRY_S)
        raise Failed("the block is not cached")

    def wait_clean(self) -> None:
        """Wait until nothing is dirty. Raises: Failed."""
        end_s = time.monotonic() + PATIENCE_S
        while time.monotonic() < end_s:
            if not self.nr_dirty():
                return
            time.sleep(TRY_S)
        raise Failed("the block stays dirty")


def say(text: str) -> None:
    print(text, flush=True)


def expect(what: str, holds: bool) -> None:
    """Raises: Failed."""
    say(f"# {what}: {'yes' if holds else 'NO'}")
    if not holds:
        raise Failed(f"{what}: no")


def content(seed: int) -> bytes:
    """A block that is no other one's."""
    return b"".join(
        f"{seed} {at:6} ".encode().ljust(SECTOR, b".") for at in range(0, BLOCK, SECTOR)
    )


def prepare(bench: Bench) -> None:
    """A cache without content, in writeback."""
    bench.start()
    bench.create_parts()
    say("# zero the first 4 KiB of cmeta")
    with PlainClient(bench.socket, "cmeta") as client:
        client.write(0, bytes(PAGE))
    bench.run("create", "cache", "--table", bench.writeback)


def reset(bench: Bench) -> None:
    """Crash, and bring up what stands under the cache."""
    bench.kill()
    bench.start()
    bench.create_parts()


def unclean(bench: Bench) -> None:
    """Passthrough after a crash that left a dirty block. Raises: Failed."""
    data = content(1)
    prepare(bench)
    bench.make_dirty(data)
    reset(bench)
    expect(
        "the cached block differs from the origin's",
        bench.read("cdata") == data != bench.read("corig"),
    )
    passthrough = bench.table("passthrough")
    bench.refused(UNCLEAN, "create", "cache", "--table", passthrough)
    say("# and again: the refusal has changed nothing")
    bench.refused(UNCLEAN, "create", "cache", "--table", passthrough)
    say("# the way out: a table that cleans; then passthrough is safe")
    cleaner = bench.table("writeback", "cleaner 0")
    bench.run("create", "cache", "--table", cleaner)
    bench.wait_clean()
    bench.run("remove", "cache")
    bench.run("create", "cache", "--table", passthrough)
    expect("the origin has what was written", bench.read("corig") == data)
    write_in_passthrough(bench, data)


def preload(bench: Bench) -> None:
    """A passthrough table, loaded before the block is made dirty. Raises: Failed."""
    data = content(2)
    prepare(bench)
    passthrough = bench.table("passthrough")
    bench.run("reload", "cache", "--table", passthrough)
    bench.make_dirty(data)
    bench.refused(NOT_CLEAN, "resume", "cache")
    say("# the way out: another table")
    bench.run("reload", "cache", "--table", bench.writeback)
    bench.run("resume", "cache")
    expect("the block is dirty still", bench.nr_dirty() == 1)
    expect("it reads as it was written", bench.read("cache") == data)
    bench.run("message", "cache", "0", "clean_now")
    bench.wait_clean()
    bench.run("reload", "cache", "--table", passthrough)
    bench.run("resume", "cache")
    expect("the origin has what was written", bench.read("corig") == data)
    write_in_passthrough(bench, data)


def dirty_log(bench: Bench) -> None:
    """After a crash only what is truly dirty stands in the way. Raises: Failed."""
    data = content(3)
    prepare(bench)
    bench.make_dirty(data)
    passthrough = bench.table("passthrough")
    reset(bench)
    bench.refused(NOT_CLEAN, "create", "cache", "--table", passthrough)
    bench.run("create", "cache", "--table", bench.writeback)
    bench.run("message", "cache", "0", "clean_now")
    bench.wait_clean()
    for _ in range(IDLES_MAX):
        say(f"# idle for {IDLE_S:g} s: time to record that the block is clean")
        time.sleep(IDLE_S)
        bench.run("status", "cache")
        reset(bench)
        say("# a crash, but nothing is dirty: passthrough is safe")
        if bench.accepted(NOT_CLEAN, "create", "cache", "--table", passthrough):
            write_in_passthrough(bench, data)
            return
        say("# not recorded yet: this machine does something else")
        bench.run("create", "cache", "--table", bench.writeback)
    raise Failed("that the block is clean is never recorded")


def write_in_passthrough(bench: Bench, data: bytes) -> None:
    """Give the cached block up by a write to a part of it: all else must stay. Raises: Failed."""
    used = bench.run("status", "cache").split()[6]
    expect("the block is cached", used.startswith("1/"))
    bench.write(bytes(PAGE))
    used = bench.run("status", "cache").split()[6]
    expect("it was given up", used.startswith("0/"))
    bench.run("remove", "cache")
    want = bytes(PAGE) + data[PAGE:]
    expect("what was not written again is as it was", bench.read("corig") == want)


STORIES: Final[dict[str, tuple[Callable[[Bench], None], tuple[str, ...]]]] = {
    "unclean shutdown": (unclean, ()),
    "preloaded table": (preload, ()),
    "dirty_log": (dirty_log, ("dirty_log",)),
}


def tell(story: Callable[[Bench], None], bench: Bench) -> str:
    """Return why the story failed, or ""."""
    try:
        story(bench)
        bench.stop()
    except (Failed, PlainClientError, StartError, OSError) as error:
        log = bench.work / "log"
        say(f"# FAILED: {error}")
        say(log.read_text() if log.exists() else "")
        return str(error)
    finally:
        bench.stop()
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="dm-cache's two passthrough bugs.")
    parser.add_argument("--dir", help="where the disk, 256 MiB of holes, goes")
    options = parser.parse_args(argv)
    verdicts = {}
    for name, (story, features) in STORIES.items():
        say(f"\n## {name}\n")
        with tempfile.TemporaryDirectory(
            prefix="passthrough-", dir=options.dir
        ) as work:
            verdicts[name] = tell(story, Bench(Path(work), *features))
    say("")
    for name, reason in verdicts.items():
        say(f"{name}: {f'FAILED: {reason}' if reason else 'no data can be lost'}")
    return int(any(verdicts.values()))


if __name__ == "__main__":
    sys.exit(main())
