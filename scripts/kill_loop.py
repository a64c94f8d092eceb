# SPDX-License-Identifier: Apache-2.0
"""SIGKILL a clone or a cache under load, start it again, hold it to its word; over and over.

    python -m scripts.kill_loop [--kind clone|clone-nbd|cache] [--rounds N] [--seed N] [--dir DIR]

Each round serves one disk from the same files as before, writes to it with many
requests in flight (writes, FUA writes, zeroes, flushes), kills the server at a random moment,
starts it again and reads the whole disk. The crash tests' model then says what each sector may
hold: what an acknowledged FLUSH or FUA covered must be there, anything else is old or new.

Every few rounds the disk comes to its end. A clone is left to finish: then the destination alone is the
disk and the source is what it always was. A cache is uncached: then the origin alone is the disk.
Until then each round of it has another mode, policy and dirty log, and blocks are promoted all the time.

Now and then the server is ended with SIGTERM instead: then it must exit with 0, and every
acknowledged write must be there, flushed or not.

A killed process is less than a power cut (the page cache survives it), so this does not
replace the crash tests: it holds the real program, with its real threads and sockets, to the
same oracle.
"""

import argparse
import errno
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from nbdtarget.common.units import SECTOR
from nbdtarget.control.client import ControlClient
from nbdtarget.control.messages import Message, MessageAnswer
from nbdtarget.fast.compiled import describe
from tests.support.model import DiskModel, Violation, Write
from tests.support.plain_client import (
    CMD_FLUSH,
    CMD_WRITE,
    CMD_WRITE_ZEROES,
    FLAG_FUA,
    PlainClient,
    PlainClientError,
)
from tests.support.processes import (
    NBDTARGET,
    ServerProcess,
    StartError,
    nbdkit_file,
)

__all__ = ["KINDS", "DiskUnderFire", "Writer", "main"]

DEPTH_MAX: Final = 32
WRITE_SECTORS_MAX: Final = 256
ROUNDS_A_DISK: Final = 4


@dataclass
class Writer:
    """Random requests, as many in flight as it likes, never two on the same sectors.

    Everything that is sent and answered is told to the model at once.
    """

    client: PlainClient
    model: DiskModel
    rng: random.Random
    fua_share: float = 0.0
    sent: int = 0
    flushed: int = 0
    _busy: dict[int, tuple[int, int]] = field(default_factory=dict)
    _writes: dict[int, tuple[list[tuple[int, Write]], bool]] = field(
        default_factory=dict
    )
    _flushes: dict[int, list[Write]] = field(default_factory=dict)

    def run(self) -> None:
        """Go on until the server goes away."""
        depth = self.rng.randint(1, DEPTH_MAX)
        # Often none at all: each FUA write commits what every FLUSH should have committed.
        self.fua_share = self.rng.choice((0.0, 0.0, 0.1))
        try:
            while True:
                while len(self._writes) + len(self._flushes) < depth:
                    self._send_one()
                self._receive_one()
        except (OSError, PlainClientError):
            return
        finally:
            self.client.sock.close()

    def _send_one(self) -> None:
        if self.rng.random() < 0.05:
            promised = self.model.start_flush()
            self._flushes[self.client.send(CMD_FLUSH)] = promised
            return
        sectors = self.rng.choice((1, 8, 8, 8, 128, WRITE_SECTORS_MAX))
        offset = self.rng.randrange(self.model.size // SECTOR - sectors) * SECTOR
        length = sectors * SECTOR
        if any(b < offset + length and offset < e for b, e in self._busy.values()):
            self._receive_one()  # a write in flight is in the way: wait
            return
        self.sent += 1
        zeroes = self.rng.random() < 0.1
        fua = self.rng.random() < self.fua_share
        data = bytes(length) if zeroes else self._content(offset, sectors)
        started = self.model.start_write(offset, data, length, f"write {self.sent}")
        cookie = self.client.send(
            CMD_WRITE_ZEROES if zeroes else CMD_WRITE,
            offset,
            length,
            payload=b"" if zeroes else data,
            flags=FLAG_FUA if fua else 0,
        )
        self._writes[cookie] = (started, fua)
        self._busy[cookie] = (offset, offset + length)

    def _content(self, offset: int, sectors: int) -> bytes:
        # Each sector says which write it is of, and where it belongs.
        return b"".join(
            f"{self.sent:12} {offset + nr * SECTOR:12} ".encode().ljust(SECTOR, b".")
            for nr in range(sectors)
        )

    def _receive_one(self) -> None:
        cookie, error, _ = self.client.receive()
        if error == errno.ESHUTDOWN:
            raise PlainClientError("the server is going down")
        if error:
            raise Violation(f"request {cookie} failed with {error}")
        if cookie in self._flushes:
            self.model.end_flush(self._flushes.pop(cookie), ok=True)
            self.flushed += 1
            return
        started, fua = self._writes.pop(cookie)
        del self._busy[cookie]
        self.model.end_write(started, ok=True, fua=fua)


class DiskUnderFire:
    """One disk, its files, and the command line that serves them."""

    kind = ""
    end = ""  # what `finish` has shown

    def __init__(self, work: Path, rng: random.Random, *, size: int) -> None:
        self.work = work
        self.rng = rng
        self.size = size
        self.socket = work / "nbd.sock"
        self.control = work / "control.sock"
        self.log = work / "log"
        content = bytearray(rng.randbytes(size))
        for _ in range(4):  # holes, on disk as in the content
            begin = rng.randrange(size // 4096) * 4096
            end = min(size, begin + size // 16)
            content[begin:end] = bytes(end - begin)
        self.content = bytes(content)
        self.renew()

    def renew(self) -> None:
        """Begin anew: other files."""
        self.model = DiskModel(self.content)
        self.was_clean = False

    def command(self) -> list[str]:
        """The command line of one round, but for where it listens."""
        raise NotImplementedError

    def describe(self) -> str:
        """The shape of this round, for the log."""
        raise NotImplementedError

    def close(self) -> None:
        """End what serves it."""

    def stir(self) -> None:
        """Have the server do what writes alone do not make it do."""

    def finish(self) -> None:
        """Bring it to its end, and look at the one disk that is left. Raises: Violation."""
        raise NotImplementedError

    def serve(self, *extra: str) -> ServerProcess:
        argv = [*self.command(), "--name", "disk", "--control", str(self.control)]
        argv += ["--listen", f"unix:{self.socket}", *extra]
        sockets = [self.control, self.socket]
        return ServerProcess(argv, sockets=sockets, log=self.log)

    def check_survivor(self) -> None:
        """Read the whole disk and settle the model on what it says. Raises: Violation."""
        with PlainClient(self.socket, "disk") as client:
            step = 1 << 20
            content = b"".join(
                client.read(at, min(step, self.size - at))
                for at in range(0, self.size, step)
            )
        if self.was_clean:
            self.model.check_read(0, content)
        else:
            self.model.check_survivor(content)
        # Data that was read now may still be lost at the next kill unless flushed: flush it.
        with PlainClient(self.socket, "disk") as client:
            client.flush()
        self.model.settle(content)

    def fire(self, life_s: float, *, clean: bool = False) -> tuple[int, int]:
        """Serve, check, write, kill. Returns how many writes and flushes were made."""
        server = self.serve()
        number = signal.SIGTERM if clean else signal.SIGKILL
        try:
            self.check_survivor()
            self.stir()
            client = PlainClient(self.socket, "disk")
            writer = Writer(client, self.model, random.Random(self.rng.random()))
            timer = threading.Timer(life_s, server.signal, [number])
            timer.start()
            try:
                writer.run()
            finally:
                timer.join()
            status = server.wait()
        finally:
            server.kill()
        if status != (0 if clean else -number):
            raise Violation(f"the server ended with status {status}")
        self.was_clean = clean
        return writer.sent, writer.flushed

    def run(self, *argv: str) -> None:
        """Run a command that must do its job."""
        with self.log.open("ab") as out:
            subprocess.run(argv, check=True, stdout=out, stderr=out, timeout=120)


class CloneUnderFire(DiskUnderFire):
    """One source, one destination."""

    kind = "clone"
    end = "the destination alone is the disk"

    def renew(self) -> None:
        """An empty destination, no metadata, another region size."""
        self.source = self.work / "source.img"
        self.dest = self.work / "dest.img"
        self.meta = self.work / "dest.meta"
        if not self.source.exists():
            self.source.write_bytes(self.content)
            subprocess.run(["fallocate", "--dig-holes", self.source], check=True)
        self.dest.unlink(missing_ok=True)
        self.meta.unlink(missing_ok=True)
        self.region_size = self.rng.choice(("4K", "4K", "64K", "1M"))
        super().renew()

    def command(self) -> list[str]:
        # Mostly without hydration: once it is through, a crash has nothing left to undo.
        extra = [] if self.rng.random() < 0.25 else ["--no-hydration"]
        return [*self._command(), *extra]

    def _command(self) -> list[str]:
        argv = [NBDTARGET, "clone", str(self.source), str(self.dest)]
        return [*argv, "--metadata", str(self.meta), "--region-size", self.region_size]

    def describe(self) -> str:
        return f"{self.region_size} regions"

    def finish(self) -> None:
        """Hydrate, then look at the destination alone."""
        with self.serve():
            self.check_survivor()
        listen = ("--listen", f"unix:{self.socket}")
        self.run(*self._command(), *listen, "--exit-when-hydrated")
        self.model.check_survivor(self.dest.read_bytes())
        if self.source.read_bytes() != self.content:
            raise Violation("the source has changed")


class NbdCloneUnderFire(CloneUnderFire):
    """As a clone, from a server over several connections, and hydration is always under way."""

    kind = "clone-nbd"
    nbdkit: ServerProcess | None = None

    def command(self) -> list[str]:
        # All of it within some two seconds: a life is shorter.
        rate = self.rng.choice((self.size // 2, 4 * self.size))
        return [*self._command(), "--hydration-rate", str(rate)]

    def _command(self) -> list[str]:
        argv = super()._command()
        argv[2] = f"nbd+unix:///?socket={self.work / 'source.sock'}"
        return argv

    def serve(self, *extra: str) -> ServerProcess:
        # nbdkit 1.32 may abort when a client that reads is killed: each round has its own.
        self.close()
        path = self.work / "source.sock"
        self.nbdkit = nbdkit_file(self.source, path, self.log, "--readonly")
        return super().serve(*extra)

    def close(self) -> None:
        if self.nbdkit is not None:
            self.nbdkit.kill()


class CacheUnderFire(DiskUnderFire):
    """One origin, one cache of a quarter of its size."""

    kind = "cache"
    end = "the origin alone is the disk"

    def renew(self) -> None:
        """The origin as it was, an empty cache, no metadata, another block size."""
        self.origin = self.work / "origin.img"
        self.cache = self.work / "cache.img"
        self.meta = self.work / "cache.meta"
        self.origin.write_bytes(self.content)
        self.cache.unlink(missing_ok=True)
        self.meta.unlink(missing_ok=True)
        self.block_size = self.rng.choice((32 << 10, 32 << 10, 64 << 10, 96 << 10))
        super().renew()

    def command(self) -> list[str]:
        rng = self.rng
        self.mode = rng.choice(("writeback", "writeback", "writeback", "writethrough"))
        self.policy = rng.choice(("smq", "smq", "smq", "cleaner"))
        self.dirty_log = rng.choice(("--dirty-log", "--no-dirty-log"))
        argv = [NBDTARGET, "cache", str(self.origin), str(self.cache)]
        argv += ["--metadata", str(self.meta), "--cache-size", str(self.size // 4)]
        argv += ["--block-size", str(self.block_size), "--mode", self.mode]
        return [*argv, "--policy", self.policy, self.dirty_log]

    def describe(self) -> str:
        words = (self.mode, self.policy, self.dirty_log.removeprefix("--"))
        return f"{self.block_size >> 10}K blocks, {' '.join(words)}"

    def stir(self) -> None:
        """Promotions, as many as the policy takes: they come from much more use than we have."""
        nr_blocks = self.size // self.block_size
        begin = self.rng.randrange(nr_blocks)
        end = self.rng.randint(begin + 1, nr_blocks)
        self._message("warm", f"{begin}-{end}")

    def _message(self, *words: str) -> None:
        client = ControlClient(self.control)
        client.ask("message", Message("disk", 0, words), MessageAnswer)

    def finish(self) -> None:
        """Uncache, then look at the origin, as clients see it and alone."""
        with self.serve():
            self.check_survivor()
            self.run(NBDTARGET, "uncache", "disk", "--control", str(self.control))
            self.was_clean = True
            self.check_survivor()
        self.model.check_read(0, self.origin.read_bytes())


KINDS: Final[dict[str, type[DiskUnderFire]]] = {
    kind.kind: kind for kind in (CloneUnderFire, NbdCloneUnderFire, CacheUnderFire)
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Kill a disk's server under load.")
    parser.add_argument("--kind", choices=sorted(KINDS), help="all, by default")
    parser.add_argument("--rounds", type=int, default=50, help="of each (50)")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 1_000_000)
    parser.add_argument("--size", type=int, default=16, help="MiB (16)")
    parser.add_argument("--dir", help="where the images go")
    options = parser.parse_args(argv)
    for kind in [options.kind] if options.kind else sorted(KINDS):
        print(f"{kind}, seed {options.seed}, {describe()}", flush=True)
        with tempfile.TemporaryDirectory(
            prefix="nbdtarget-kill-", dir=options.dir
        ) as name:
            rng = random.Random(options.seed)
            disk = KINDS[kind](Path(name), rng, size=options.size << 20)
            try:
                _run_rounds(disk, options.rounds)
            except (
                Violation,
                PlainClientError,
                StartError,
                subprocess.CalledProcessError,
            ) as error:
                log = disk.log.read_text()
                print(f"FAILED with seed {options.seed}: {error}\n{log}")
                return 1
            finally:
                disk.close()
    return 0


def _run_rounds(disk: DiskUnderFire, rounds: int) -> None:
    """Raises: Violation, PlainClientError, StartError, CalledProcessError."""
    for round_nr in range(1, rounds + 1):
        life_s = disk.rng.uniform(0.02, 0.6)
        clean = disk.rng.random() < 0.2
        sent, flushed = disk.fire(life_s, clean=clean)
        print(
            f"round {round_nr}: {disk.describe()},"
            f" {'SIGTERM' if clean else 'SIGKILL'} after {life_s:.2f} s,"
            f" {sent} writes, {flushed} flushes",
            flush=True,
        )
        if round_nr % ROUNDS_A_DISK == 0 or round_nr == rounds:
            disk.finish()
            disk.renew()
            print(f"finished: {disk.end}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
