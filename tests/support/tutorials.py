# SPDX-License-Identifier: Apache-2.0
r"""Runs the command lines of a tutorial, and compares what they print with what the page shows.

A page is run from top to bottom. Its blocks of ```console hold lines that begin with `$ `, which are commands, and what
they print. `/srv` is the directory where the commands run, and `/run/user/1000` holds the sockets; both become
directories of the test.

A comment before a block says more about it:

    <!-- run: server -->    the one command of the block goes on running, and the test goes on when all of the shown
                            lines were printed. It ends at a `^C` or `^\` in a later block of the same name, or at the end
    <!-- run: no -->        the block is not run

In the shown lines `…` stands for anything within a line, and a line `…` for any number of lines.
`python -m tests.support.tutorials PAGE` runs a page and prints where it differs.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final, NamedTuple

from tests.support.patience import PATIENCE_S
from tests.support.processes import NBDTARGET
from tests.support.reference_pages import DOCS

__all__ = ["Block", "Difference", "blocks_of", "run_page"]

# The terminal sends these signals to the process in it.
KEYS: Final = {"^C": signal.SIGINT, "^\\": signal.SIGQUIT}
_BLOCK: Final = re.compile(
    r"(?:<!-- run: (\w+) -->\n+)?```console\n(.*?)```", re.DOTALL
)


class Difference(AssertionError):
    """A command printed something else than the page shows."""


class Block(NamedTuple):
    """One block of a page. `steps`: each command with the lines that it must print."""

    how: str
    steps: list[tuple[str, list[str]]]


def blocks_of(text: str) -> Iterator[Block]:
    """The blocks of a page, in order."""
    for how, body in _BLOCK.findall(text):
        steps: list[tuple[str, list[str]]] = []
        for line in body.splitlines():
            if line.startswith("$ ") or line in KEYS:
                steps.append((line.removeprefix("$ "), []))
            elif line.startswith("> "):
                command, shown = steps.pop()
                steps.append((f"{command}\n{line[2:]}", shown))
            elif steps:
                steps[-1][1].append(line)
        yield Block(how, steps)


class _Server:
    """A command that goes on running, with a terminal of its own."""

    def __init__(self, command: str, work: "_Work") -> None:
        self.log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        self.work = work
        self.process = subprocess.Popen(
            # A suite that runs in the background of a shell has these signals ignored, and so would its children.
            [
                "env",
                "--default-signal=INT,QUIT",
                "bash",
                "-c",
                f"exec {work.real(command)}",
            ],
            cwd=work.directory,
            env=work.environment,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=self.log,
        )
        self.seen = 0

    def must_print(self, shown: list[str]) -> None:
        """Wait until what was printed since the last call is what is shown."""
        end = time.monotonic() + PATIENCE_S
        while True:
            ended = self.process.poll() is not None
            printed = self._whole_lines()
            lines = self.work.shown(printed.decode())
            if _is_shown(shown, lines):
                self.seen += len(printed)
                return
            if ended or time.monotonic() > end:
                raise Difference(_compare("(the server)", shown, lines))
            time.sleep(0.02)

    def _whole_lines(self) -> bytes:
        # The command writes where this descriptor stands, too: a seek of ours would move what it writes.
        size = os.fstat(self.log.fileno()).st_size - self.seen
        printed = os.pread(self.log.fileno(), size, self.seen)
        return printed[: printed.rfind(b"\n") + 1]

    def press(self, key: str) -> None:
        self.process.send_signal(KEYS[key])
        self.process.wait(PATIENCE_S)

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        self.log.close()


class _Work:
    """The directories that stand for those of the page, and what runs there."""

    def __init__(self, directory: Path, sockets: Path) -> None:
        self.directory = directory
        self.sockets = sockets
        path = f"{Path(NBDTARGET).parent}:{os.environ['PATH']}:/usr/sbin:/sbin"
        unset = ("RUNTIME_DIRECTORY", "NBDTARGET_CONTROL", "NBDTARGET_CONTROL_TOKEN")
        self.environment = {
            **{key: value for key, value in os.environ.items() if key not in unset},
            "XDG_RUNTIME_DIR": str(sockets),
            "PATH": path,
            "LC_ALL": "C.UTF-8",
            "TZ": "UTC",
        }

    def real(self, command: str) -> str:
        command = command.replace("/run/user/1000", str(self.sockets))
        return re.sub(r"(?<![\w.])/srv(?=/|\b)", str(self.directory), command)

    def shown(self, printed: str) -> list[str]:
        printed = printed.replace(str(self.sockets), "/run/user/1000")
        return printed.replace(str(self.directory), "/srv").splitlines()

    def run(self, command: str, shown: list[str]) -> None:
        done = subprocess.run(
            ["bash", "-c", self.real(command)],
            cwd=self.directory,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=PATIENCE_S,
        )
        lines = self.shown(done.stdout)
        if not _is_shown(shown, lines):
            raise Difference(_compare(command, shown, lines))


def _is_shown(shown: list[str], printed: list[str]) -> bool:
    pattern = "".join(
        r"(?:.*\n)*?"
        if line == "…"
        else ".*?".join(map(re.escape, line.split("…"))) + r"\n"
        for line in shown
    )
    return re.fullmatch(pattern, "".join(f"{line}\n" for line in printed)) is not None


def _compare(command: str, shown: list[str], printed: list[str]) -> str:
    return "\n".join(
        [f"$ {command}", "the page shows:", *shown, "it printed:", *printed]
    )


def run_page(text: str, directory: Path) -> None:
    """Run a page. Raises: Difference."""
    sockets = Path(tempfile.mkdtemp(prefix="nbdt"))
    work = _Work(directory, sockets)
    servers: dict[str, _Server] = {}
    try:
        for block in blocks_of(text):
            _run_block(block, work, servers)
    finally:
        for server in servers.values():
            server.close()
        shutil.rmtree(sockets, ignore_errors=True)


def _run_block(block: Block, work: _Work, servers: dict[str, _Server]) -> None:
    if block.how == "no":
        return
    if not block.how:
        for command, shown in block.steps:
            work.run(command, shown)
        return
    ((command, shown),) = block.steps
    if command in KEYS:
        servers[block.how].press(command)
    else:
        if block.how in servers:
            servers.pop(block.how).close()
        servers[block.how] = _Server(command, work)
    servers[block.how].must_print(shown)


def main() -> int:
    """Run the pages that are named."""
    status = 0
    for name in sys.argv[1:]:
        with tempfile.TemporaryDirectory(prefix="nbdt") as directory:
            try:
                run_page((DOCS / "tutorial" / name).read_text(), Path(directory))
            except Difference as difference:
                print(f"{name}: {difference}")
                status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
