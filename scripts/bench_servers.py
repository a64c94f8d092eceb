# SPDX-License-Identifier: Apache-2.0
"""The servers that `make bench` pairs: in C, and ours through several kinds of table.

Each serves its own copy of one image, so that a server's writes disturb no other's page cache
and exclusive locks do not collide. All of them stay up for the whole run and only one is
driven at a time; an idle server costs nothing.
"""

import os
import shutil
import socket
import subprocess
import time
from pathlib import Path
from typing import ClassVar, Final

from nbdtarget.common.units import SECTOR
from nbdtarget.devices.file.page_cache import cached_pages
from nbdtarget.devices.file.pieces import WRITE_PIECE
from scripts.fio import Job
from tests.support.processes import NBDTARGET, ServerProcess, nbdkit_file

__all__ = [
    "CLONE",
    "CONTENDERS",
    "HALF",
    "LINEAR",
    "PEERS",
    "Clone",
    "Contender",
    "Floor",
    "HalfClone",
    "Linear",
    "NbdServer",
    "Nbdkit",
    "Pure",
    "QemuDirect",
    "QemuNbd",
]

COOL_S: Final = 30.0  # for a server to give back what it has mapped

FLOOR = "floor"
LINEAR = "linear"
PURE = "linear-pure"
CLONE = "clone"
HALF = "clone-half"


class Contender:
    """One server under test.

    Attributes:
        name: in the table and for `--only`.
        tool: the program it needs; a missing one is skipped by name.
        export: the NBD export name.
    """

    name: ClassVar[str]
    tool: ClassVar[str]
    export: ClassVar[str] = ""

    def __init__(self, work: Path, source: Path) -> None:
        self.source = source
        self.image = work / f"{self.name}.img"
        self.socket = work / f"{self.name}.sock"
        self.log = work / f"{self.name}.log"
        self.process: ServerProcess | None = None
        self.is_warm = False

    @classmethod
    def maybe_missing(cls) -> str | None:
        """Return the program that is not installed, if so."""
        return None if shutil.which(cls.tool) else cls.tool

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.export}?socket={self.socket}"

    def copy_image(self) -> None:
        self.image.unlink(missing_ok=True)
        self._write_image()

    def _write_image(self) -> None:
        """Write the source's bytes through the page cache, in pieces as our hydration writes."""
        flags = os.O_RDWR | os.O_CREAT
        with (
            self.source.open("rb") as source,
            open(os.open(self.image, flags), "r+b", 0) as image,
        ):
            while piece := source.read(WRITE_PIECE):
                image.write(piece)
        self.settle()

    def settle(self) -> None:
        """Write dirty pages back, so that no sample pays for the one before it."""
        fd = os.open(self.image, os.O_RDWR)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def warm(self) -> None:
        """Have the image in the page cache, and in the same pieces for each server.

        Some servers drop the image from the page cache when they open it. If it is then read, and not written, the
        kernel keeps it in larger pieces, and on ext4 that makes each small write three times as expensive.
        """
        if not self.is_warm:
            self.cool()
            self._write_image()
            self.is_warm = True

    def cool(self) -> None:
        """Drop the image from the page cache, so that reads come from the disk.

        A server may have parts of it mapped: these stay until it gives them back, and without it reads are no cold ones.

        Raises: RuntimeError: something stays.
        """
        self.settle()
        fd = os.open(self.image, os.O_RDONLY)
        end_s = time.monotonic() + COOL_S
        try:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            while cached_pages(fd, 0, os.fstat(fd).st_size):
                if time.monotonic() > end_s:
                    raise RuntimeError(f"{self.image} stays in the page cache")
                time.sleep(0.2)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)
        self.is_warm = False

    def start(self) -> None:
        """Prepare the image and serve it."""
        self.is_warm = False
        self.copy_image()
        self.process = self.launch()

    def launch(self) -> ServerProcess:
        raise NotImplementedError

    def takes(self, job: Job) -> bool:
        """Whether it takes part in the job."""
        return True

    def before(self, *, writes: bool) -> None:
        """Called before each sample."""

    def maybe_remark(self) -> str | None:
        """Return what there is to say of the rounds, after the last one."""
        return None

    def running(self) -> ServerProcess:
        assert self.process is not None
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.terminate()

    def kill(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()


class Nbdkit(Contender):
    name = "nbdkit"
    tool = "nbdkit"

    def launch(self) -> ServerProcess:
        return nbdkit_file(self.image, self.socket, self.log)


class QemuNbd(Contender):
    name = "qemu-nbd"
    tool = "qemu-nbd"

    def launch(self) -> ServerProcess:
        argv = ["qemu-nbd", "--format=raw", "--persistent", "--shared=4"]
        argv += ["--cache=writeback", "--discard=unmap"]
        argv += [f"--socket={self.socket}", str(self.image)]
        return ServerProcess(argv, sockets=[self.socket], log=self.log)


class QemuDirect(QemuNbd):
    """As it is set up for disks that are larger than memory."""

    name = "qemu-direct"

    def launch(self) -> ServerProcess:
        argv = ["qemu-nbd", "--format=raw", "--persistent", "--shared=4"]
        argv += ["--cache=none", "--aio=native", f"--socket={self.socket}"]
        return ServerProcess(
            [*argv, str(self.image)], sockets=[self.socket], log=self.log
        )


class Floor(Contender):
    """The cost of the kernel alone: `bench_floor.c` makes the system calls and nothing else."""

    name = FLOOR
    tool = "cc"

    def takes(self, job: Job) -> bool:
        return not job.cold and not job.durable

    def launch(self) -> ServerProcess:
        program = self.socket.with_suffix(".floor")
        source = Path(__file__).with_name("bench_floor.c")
        subprocess.run(["cc", "-O2", "-o", str(program), str(source)], check=True)
        return ServerProcess(
            [str(program), str(self.socket), str(self.image)],
            sockets=[self.socket],
            log=self.log,
        )


class NbdServer(Contender):
    name = "nbd-server"
    tool = "nbd-server"
    export = "bench"

    def launch(self) -> ServerProcess:
        # It cannot do without a TCP port, nor stay in the foreground for a second client.
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        config = self.log.with_suffix(".conf")
        pid_file = self.log.with_suffix(".pid")
        config.write_text(
            f"[generic]\nunixsock = {self.socket}\nlistenaddr = 127.0.0.1\nport = {port}\n"
            f"[{self.export}]\nexportname = {self.image}\nflush = true\nfua = true\n"
        )
        argv = ["nbd-server", "-C", str(config), "-p", str(pid_file)]
        return ServerProcess(
            argv, sockets=[self.socket], log=self.log, pid_file=pid_file
        )


class Ours(Contender):
    tool = NBDTARGET
    export = "bench"


class Linear(Ours):
    name = LINEAR

    def launch(self) -> ServerProcess:
        control = self.socket.with_suffix(".control")
        argv = [NBDTARGET, "serve", "--listen", f"unix:{self.socket}"]
        argv += ["--control", str(control)]
        process = ServerProcess(argv, sockets=[self.socket, control], log=self.log)
        sectors = self.image.stat().st_size // SECTOR
        table = f"0 {sectors} linear {self.image} 0"
        try:
            subprocess.run(
                [NBDTARGET, "create", self.export, "--table", table],
                env={**os.environ, "NBDTARGET_CONTROL": str(control)},
                check=True,
                stdout=subprocess.DEVNULL,
            )
        except BaseException:
            process.kill()
            raise
        return process


class Pure(Linear):
    """Without the compiled fast path."""

    name = PURE

    def launch(self) -> ServerProcess:
        os.environ["NBDTARGET_PURE"] = "1"  # children inherit it
        try:
            return super().launch()
        finally:
            del os.environ["NBDTARGET_PURE"]


class Clone(Ours):
    """A clone that is hydrated before it is measured."""

    name = CLONE
    region_size = 64 * 1024

    def argv(self, *extra: str) -> list[str]:
        return [
            *[NBDTARGET, "clone", str(self.source), str(self.image)],
            *["--metadata", str(self.image.with_suffix(".meta"))],
            *["--name", self.export, "--region-size", "64K"],
            *["--listen", f"unix:{self.socket}"],
            *["--control", str(self.socket.with_suffix(".control")), *extra],
        ]

    def create_destination(self) -> None:
        self.is_warm = False
        self.image.unlink(missing_ok=True)
        self.image.with_suffix(".meta").unlink(missing_ok=True)
        with self.image.open("wb") as file:
            file.truncate(self.source.stat().st_size)

    def start(self) -> None:
        self.create_destination()
        with self.log.open("ab") as out:
            subprocess.run(
                self.argv("--exit-when-hydrated"),
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                timeout=300,
            )
        self.process = self.launch()

    def launch(self) -> ServerProcess:
        return ServerProcess(self.argv(), sockets=[self.socket], log=self.log)


class HalfClone(Clone):
    """A clone whose every second region is hydrated, and stays so.

    A write hydrates the region that it falls into, so each sample after one that wrote
    starts from a fresh clone.
    """

    name = HALF

    def __init__(self, work: Path, source: Path) -> None:
        super().__init__(work, source)
        self.fresh = False

    def start(self) -> None:
        self.create_destination()
        self.process = self.launch()
        self.hydrate_every_second_region()
        self.fresh = True

    def launch(self) -> ServerProcess:
        return ServerProcess(
            self.argv("--no-hydration"), sockets=[self.socket], log=self.log
        )

    def hydrate_every_second_region(self) -> None:
        size = self.source.stat().st_size
        # Whole-region overwrites: hydrated without a copy, skipping one region each time.
        argv = ["fio", "--name=half", "--ioengine=nbd", f"--uri={self.uri}"]
        argv += [f"--rw=write:{self.region_size}", f"--bs={self.region_size}"]
        argv += [f"--io_size={size // 2}", "--iodepth=16", "--end_fsync=1"]
        subprocess.run(argv, check=True, stdout=subprocess.DEVNULL)

    def before(self, *, writes: bool) -> None:
        if not self.fresh:
            self.stop()
            self.start()
        self.fresh = not writes


PEERS: tuple[type[Contender], ...] = (Nbdkit, QemuNbd, QemuDirect, NbdServer)
CONTENDERS: tuple[type[Contender], ...] = (
    Floor,
    *PEERS,
    Pure,
    Linear,
    Clone,
    HalfClone,
)
