# SPDX-License-Identifier: Apache-2.0
"""Real clients, real servers, and the disks between them."""

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import pytest

from tests.support.patience import PATIENCE_S
from tests.support.places import ROOT
from tests.support.processes import NBDTARGET, ServerProcess, nbdkit_file

__all__ = [
    "MIB",
    "NAME",
    "NEWER",
    "CloneUnderTest",
    "client",
    "needs",
    "needs_newer",
    "refused",
    "report",
    "serving",
]

MIB: Final = 1 << 20
NAME: Final = "disk"
# Where `scripts/newer-clients` puts the programs that speak extended headers.
NEWER: Final = ROOT / "build" / "newer-clients" / "bin"


def needs(*programs: str) -> pytest.MarkDecorator:
    """Skip, by name, where a real client is not installed."""
    missing = [name for name in programs if shutil.which(name) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"not installed: {', '.join(missing)}"
    )


needs_newer = pytest.mark.skipif(
    not NEWER.is_dir(), reason="not unpacked: clients that speak extended headers"
)


def client(*argv: str, status: int = 0) -> str:
    """Run a client to its end and return what it printed.

    The exit status is part of what is tested: another one fails the test with the output.
    """
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == status, f"{' '.join(argv)}\n{done.stdout}"
    return done.stdout


def report(*argv: str) -> Any:
    """Run a client that prints JSON."""
    return json.loads(client(*argv))


class CloneUnderTest:
    """One clone: its files, its command line, and its server while it runs.

    Attributes:
        name: of its export.
        source: what the command line names: a path or a URI.
        content: what the source holds, and what the disk holds before the first write.
    """

    def __init__(
        self, work: Path, content: bytes, source: str, *, name: str = NAME
    ) -> None:
        self.work = work
        self.name = name
        self.content = content
        self.source = source
        self.dest = work / "dest.img"
        self.metadata = work / "metadata"
        self.socket = work / "nbd.sock"
        self.log = work / "log"

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{self.name}?socket={self.socket}"

    def argv(self, *extra: str) -> list[str]:
        return [
            *[NBDTARGET, "clone", self.source, str(self.dest)],
            *["--metadata", str(self.metadata), "--name", self.name],
            *["--listen", f"unix:{self.socket}", *extra],
        ]

    def start(self, *extra: str) -> ServerProcess:
        return ServerProcess(self.argv(*extra), sockets=[self.socket], log=self.log)

    @contextmanager
    def serve(self, *extra: str) -> Iterator[ServerProcess]:
        """Serve; at the end SIGTERM must end it with 0 and without a complaint."""
        process = self.start(*extra)
        try:
            yield process
        except BaseException:
            process.kill()
            print(self.log.read_text())
            raise
        assert process.terminate() == 0, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def hydrate(self) -> None:
        """Copy what is left, and end."""
        client(*self.argv("--exit-when-hydrated"))


@contextmanager
def serving(kind: str, image: Path, work: Path) -> Iterator[str]:
    """Offer `image` as a clone's source: a path, or the URI of a real server's export."""
    path = work / "source.sock"
    log = work / "source.log"
    uri = f"nbd+unix:///?socket={path}"
    if kind == "file":
        yield str(image)
    elif kind == "nbdkit":
        with nbdkit_file(image, path, log, "--readonly"):
            yield uri
    elif kind == "qemu-nbd":
        argv = ["qemu-nbd", "--format=raw", "--read-only", "--persistent"]
        argv += ["--shared=4", f"--socket={path}", str(image)]
        with ServerProcess(argv, sockets=[path], log=log):
            yield uri
    else:
        raise AssertionError(kind)


def refused(argv: list[str], **environment: str) -> str:
    """Run a command that must fail politely. Returns its one line."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        env={**os.environ, **environment},
    )
    assert done.returncode in (1, 2), done
    assert "Traceback" not in done.stderr
    (line,) = done.stderr.strip().splitlines()
    return line
