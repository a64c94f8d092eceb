# SPDX-License-Identifier: Apache-2.0
"""One cache in a server of its own, made with the plumbing, for the cache's benchmarks.

The devices are files (or, as the origin, anything that a table may name); metadata are made by
the table, or beforehand by `make_full_metadata`, which maps every block of a cache without
copying anything.
"""

import contextlib
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, TypeVar

from nbdtarget.common.units import SECTOR
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.targets.metadata_io import run_file
from nbdtarget_metadata.cache.metadata import CacheMetadata
from nbdtarget_metadata.operations import Steps
from tests.support.processes import NBDTARGET, ServerProcess

__all__ = [
    "KIB",
    "MIB",
    "CacheUnderTest",
    "Counters",
    "make_full_metadata",
    "make_sparse",
    "uri_of",
]

KIB: Final = 1 << 10
MIB: Final = 1 << 20
EXPORT: Final = "bench"
POLL_S: Final = 0.05
PATIENCE_S: Final = 120.0
COMMIT_CBLOCKS: Final = 4096

T = TypeVar("T")
Fields = Mapping[str, bool | int | float | str | None]


class Counters:
    """The counters of bios between two looks at the status."""

    NAMES: Final = ("read_hits", "read_misses", "write_hits", "write_misses")

    def __init__(self, before: Fields, after: Fields) -> None:
        deltas = [_number(after, name) - _number(before, name) for name in self.NAMES]
        self.read_hits, self.read_misses, self.write_hits, self.write_misses = deltas
        self.hits = self.read_hits + self.write_hits
        self.total = self.hits + self.read_misses + self.write_misses

    @property
    def hit_ratio(self) -> float:
        return self.hits / self.total if self.total else 0.0


def _number(fields: Fields, name: str) -> int:
    value = fields[name]
    assert isinstance(value, int), name
    return value


class CacheUnderTest:
    """A cache that is served until told to stop.

    Args:
        work: where its sockets, log, metadata and cache device go.
        origin: as in a table line. length: its bytes.
        block_size: bytes.
        words: what follows the block size in the table line.
        serve: the command that runs the server, up to its options.
    """

    WRITEBACK: Final = "1 writeback smq 0"

    def __init__(
        self,
        work: Path,
        origin: str,
        length: int,
        *,
        block_size: int,
        words: str = WRITEBACK,
        name: str = "cache",
        serve: Sequence[str] = (NBDTARGET, "serve"),
    ) -> None:
        self.origin = origin
        self.length = length
        self.block_size = block_size
        self.words = words
        self.device = work / f"{name}.fast"
        self.metadata = work / f"{name}.meta"
        self.socket = work / f"{name}.sock"
        self.log = work / f"{name}.log"
        self._control = work / f"{name}.control"
        self._serve = serve
        self.process: ServerProcess | None = None

    @property
    def uri(self) -> str:
        return uri_of(self.socket, EXPORT)

    @property
    def export(self) -> str:
        return EXPORT

    @property
    def table(self) -> str:
        names = f"{self.metadata} {self.device} {self.origin}"
        sectors = self.length // SECTOR
        return f"0 {sectors} cache {names} {self.block_size // SECTOR} {self.words}"

    def make_device(self, size: int) -> None:
        """Make an empty cache device, and drop the metadata of another one."""
        make_sparse(self.device, size)
        self.metadata.unlink(missing_ok=True)

    def start(self, *, timeout_s: float = PATIENCE_S) -> None:
        """Serve, and create the device. Raises: StartError, NbdTargetError."""
        argv = [*self._serve, "--listen", f"unix:{self.socket}"]
        argv += ["--control", str(self._control)]
        self.process = ServerProcess(
            argv,
            sockets=[self.socket, self._control],
            log=self.log,
            timeout_s=timeout_s,
        )
        try:
            self._ask("create", m.Create(EXPORT, self.table), m.Done)
        except BaseException:
            self.kill()
            raise

    def _ask(self, verb: str, request: m.Request, answer: type[m.Answer]) -> m.Answer:
        return ControlClient(self._control).ask(verb, request, answer)

    def status(self, *, noflush: bool = True) -> Fields:
        """The named fields of the status. `noflush`: without a commit before it."""
        answer = self._ask("status", m.Status((EXPORT,), None, noflush), m.LinesAnswer)
        assert isinstance(answer, m.LinesAnswer)
        return answer.devices[0].lines[0].fields

    def number(self, name: str) -> int:
        return _number(self.status(), name)

    def message(self, *words: str) -> None:
        self._ask("message", m.Message(EXPORT, 0, words), m.MessageAnswer)

    def wait_until(self, name: str, wanted: int) -> None:
        """Wait until a number of the status is `wanted`. Raises: TimeoutError."""
        deadline = time.monotonic() + PATIENCE_S
        while (found := self.number(name)) != wanted:
            if time.monotonic() > deadline:
                raise TimeoutError(f"{name} is {found}, never {wanted}: {self.log}")
            time.sleep(POLL_S)

    def warm(self, begin: int, end: int) -> None:
        """Have the blocks of the origin from `begin` to `end` cached, and nothing under way."""
        wanted = self.number("cache_blocks_used") + end - begin
        self.message("warm", f"{begin}-{end}")
        self.wait_until("cache_blocks_used", wanted)
        self.wait_until("migrating", 0)

    def clean(self) -> None:
        """Have everything written back, durably."""
        self.message("clean_now")
        self.wait_until("dirty_blocks", 0)
        self.wait_until("migrating", 0)
        self.status(noflush=False)

    def running(self) -> ServerProcess:
        assert self.process is not None
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.terminate(PATIENCE_S)

    def kill(self) -> None:
        if self.process is not None:
            process, self.process = self.process, None
            process.kill()

    @contextlib.contextmanager
    def serving(self) -> Iterator[ServerProcess]:
        """Start; stop at the end, or kill if it ends badly."""
        self.start()
        try:
            yield self.running()
            self.stop()
        finally:
            self.kill()


def uri_of(path: Path, export: str = "") -> str:
    return f"nbd+unix:///{export}?socket={path}"


def make_sparse(path: Path, size: int) -> None:
    """Make a file of `size` bytes that is one hole."""
    with path.open("wb") as file:
        file.truncate(size)


def make_full_metadata(
    path: Path, *, block_size: int, origin_size: int, nr_cblocks: int
) -> None:
    """Make metadata of a cache whose blocks are all mapped, clean and cleanly shut down.

    The oblocks are spread evenly over the origin; nothing is copied, so both devices should be
    holes.
    """

    def run(steps: Steps[T]) -> T:
        return run_file(path, steps)

    def commit(*, clean_shutdown: bool = False) -> None:
        transaction = metadata.pre_commit(clean_shutdown=clean_shutdown)
        if transaction is not None:
            run(transaction.journal())
            run(transaction.superblock())
            transaction.done()

    device_size = CacheMetadata.device_size_for(nr_cblocks)
    make_sparse(path, device_size)
    metadata = run(
        CacheMetadata.format(
            device_size=device_size,
            block_size=block_size,
            origin_size=origin_size,
            nr_cblocks=nr_cblocks,
            uuid=uuid.uuid4().bytes,
        )
    )
    run(metadata.start(dirty_log=False))
    commit()
    stride = metadata.nr_oblocks // nr_cblocks
    for cblock in range(nr_cblocks):
        metadata.insert(cblock, cblock * stride, dirty=False)
        if cblock % COMMIT_CBLOCKS == COMMIT_CBLOCKS - 1:
            commit()
            if metadata.needs_compaction:
                run(metadata.compact())
    metadata.prepare_shutdown()
    commit(clean_shutdown=True)
