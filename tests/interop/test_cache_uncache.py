# SPDX-License-Identifier: Apache-2.0
"""A cache in front of a slow origin, in the real program with real clients. Then the cache is removed."""

import json
import random
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.support.clients import MIB, NAME, client, needs, report
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = [pytest.mark.interop, pytest.mark.long]

SIZE = 16 * MIB
CACHE_SIZE = 4 * MIB
BLOCK = 64 << 10
CONTEXT = "x-nbdtarget:cache"
FIO_WAS_ENDED = 128  # its exit status after a signal


class CacheUnderTest:
    """One origin, one cache, and the program that serves them."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.origin = work / "origin.img"
        self.cache = work / "cache.img"
        self.metadata = work / "cache.img.nbdtarget"
        self.socket = work / "nbd.sock"
        self.origin_socket = work / "origin.sock"
        self.control = work / "control.sock"
        self.log = work / "log"
        self.content = random.Random(5).randbytes(SIZE)
        self.origin.write_bytes(self.content)

    @property
    def uri(self) -> str:
        return f"nbd+unix:///{NAME}?socket={self.socket}"

    @property
    def origin_uri(self) -> str:
        return f"nbd+unix:///?socket={self.origin_socket}"

    @contextmanager
    def remote_origin(self, *filters: str) -> Iterator[None]:
        """The origin as another server's export, through nbdkit's filters."""
        names = [word for word in filters if word.startswith("--")]
        settings = [word for word in filters if not word.startswith("--")]
        argv = ["nbdkit", "--foreground", f"--unix={self.origin_socket}", *names]
        argv += ["file", str(self.origin), *settings]
        log = self.work / "origin.log"
        with ServerProcess(argv, sockets=[self.origin_socket], log=log):
            yield

    @contextmanager
    def serve(
        self, origin: str, *options: str, status: int = 0
    ) -> Iterator[ServerProcess]:
        argv = [NBDTARGET, "cache", origin, str(self.cache), "--name", NAME]
        argv += ["--cache-size", str(CACHE_SIZE), "--control", str(self.control)]
        argv += ["--listen", f"unix:{self.socket}", *options]
        sockets = [self.socket, self.control]
        process = ServerProcess(argv, sockets=sockets, log=self.log)
        try:
            yield process
        except BaseException:
            process.kill()
            print(self.log.read_text())
            raise
        assert process.terminate() == status, self.log.read_text()
        assert "Traceback" not in self.log.read_text(), self.log.read_text()

    def ask(self, *words: str, status: int = 0) -> str:
        return client(
            NBDTARGET, *words, "--control", str(self.control), status=status
        ).strip()

    def fields(self) -> dict[str, Any]:
        (line,) = json.loads(self.ask("status", "--json", NAME))["devices"][0]["lines"]
        fields: dict[str, Any] = line["fields"]
        return fields

    def wait(self, what: Callable[[dict[str, Any]], bool]) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not what(fields := self.fields()):
            assert time.monotonic() < deadline, fields
            time.sleep(0.05)

    def dirty(self, nr_blocks: int) -> bytes:
        """Cache some blocks and write to each; return the content of the disk then."""
        self.ask("message", NAME, "0", "warm", f"0-{nr_blocks}")
        self.wait(lambda fields: fields["cache_blocks_used"] >= nr_blocks)
        image = bytearray(self.content)
        with PlainClient(self.socket, NAME) as disk:
            for block in range(nr_blocks):
                at = block * BLOCK + 512 * (block % 128)
                image[at : at + 512] = random.Random(block).randbytes(512)
                disk.write(at, bytes(image[at : at + 512]))
            disk.flush()
            disk.disconnect()
        return bytes(image)

    def read_all(self) -> bytes:
        with PlainClient(self.socket, NAME) as disk:
            image = b"".join(disk.read(at, MIB) for at in range(0, SIZE, MIB))
            disk.disconnect()
        return image


@pytest.fixture
def cache(tmp_path: Path) -> CacheUnderTest:
    return CacheUnderTest(tmp_path)


@needs("nbdinfo", "nbdcopy", "qemu-io")
@pytest.mark.parametrize("mode", ["writethrough", "writeback"])
def test_clients_find_a_disk(cache: CacheUnderTest, mode: str) -> None:
    with cache.serve(str(cache.origin), "--mode", mode):
        export = report("nbdinfo", "--json", cache.uri)["exports"][0]
        assert export["export-size"] == SIZE
        assert CONTEXT in export["contexts"]
        image = cache.dirty(8)
        if mode == "writethrough":
            assert cache.origin.read_bytes() == image
        extents = report("nbdinfo", "--json", f"--map={CONTEXT}", cache.uri)
        (first, *_) = extents
        # bit 0: cached, bit 1: dirty, if it has not been written back by now
        assert first["offset"] == 0
        assert first["type"] & 1
        assert sum(each["length"] for each in extents if each["type"] & 1) >= 8 * BLOCK
        client("qemu-io", "-f", "raw", cache.uri, "-c", "write -P 7 1M 4k")
        client("qemu-io", "-f", "raw", cache.uri, "-c", "read -P 7 1M 4k")
        copy = cache.work / "copy.img"
        client("nbdcopy", cache.uri, str(copy))
    expected = image[:MIB] + b"\7" * 4096 + image[MIB + 4096 :]
    assert copy.read_bytes() == expected
    # The same line continues, and reads blocks that are no longer cached from the origin.
    with cache.serve(str(cache.origin), "--mode", mode):
        assert cache.read_all() == expected
        assert f"{NAME} is {cache.origin} alone" in cache.ask("uncache", NAME)
        assert cache.read_all() == expected
    assert cache.origin.read_bytes() == expected


@needs("fio", "nbdkit")
def test_fio_verifies_while_the_cache_goes_away(cache: CacheUnderTest) -> None:
    """Writes to the origin take 3 ms, so it takes a while to write the dirty blocks back."""
    delays = ("--filter=delay", "wdelay=3ms", "rdelay=1ms")
    with (
        cache.remote_origin(*delays),
        cache.serve(cache.origin_uri, "--mode", "writeback"),
    ):
        cache.ask("message", NAME, "0", "migration_threshold", "0")
        cache.ask("message", NAME, "0", "warm", f"0-{CACHE_SIZE // BLOCK}")
        cache.wait(lambda fields: fields["cache_blocks_used"] == CACHE_SIZE // BLOCK)
        argv = ["fio", "--name=verify", "--ioengine=nbd", f"--uri={cache.uri}"]
        argv += ["--rw=randwrite", "--bs=4k", "--iodepth=16", "--randseed=5"]
        argv += ["--size=8M", "--rate_iops=400", "--fsync=50", "--verify=crc32c"]
        # fio runs until it is told to end, however long the rest takes.
        argv += ["--verify_backlog=50", "--loops=100000", "--verify_state_save=0"]
        argv += ["--verify_fatal=1", f"--aux-path={cache.work}"]
        told = cache.work / "fio.log"
        with told.open("w") as out:
            fio = subprocess.Popen(argv, stdout=out, stderr=out)
        try:
            cache.wait(lambda fields: fields["dirty_blocks"] > 40)
            events = [
                json.loads(line)
                for line in cache.ask("uncache", "--json", NAME).splitlines()
            ]
            written_ns = cache.origin.stat().st_mtime_ns
            wait_until(lambda: cache.origin.stat().st_mtime_ns > written_ns)
            fio.send_signal(signal.SIGINT)
            fio.wait(PATIENCE_S)
        finally:
            fio.kill()
            fio.wait()
        assert fio.returncode == FIO_WAS_ENDED, told.read_text()
        assert "err= 0" in told.read_text()
        assert events[0]["event"] == "draining"
        assert events[-2]["dirty_blocks"] == 0
        assert events[-1]["event"] == "uncached"
        assert (
            cache.ask("table", NAME) == f"0 {SIZE // 512} linear {cache.origin_uri} 0"
        )
        image = cache.read_all()
    assert cache.origin.read_bytes() == image
    assert "uncached: " in cache.log.read_text()


@needs("nbdkit")
def test_ctrl_c_and_the_same_command_again(cache: CacheUnderTest) -> None:
    """The origin has no space for a while."""
    failing = cache.work / "failing"
    errors = (
        "--filter=error",
        "error-pwrite=ENOSPC",
        "error-pwrite-rate=100%",
        f"error-file={failing}",
    )
    with (
        cache.remote_origin(*errors),
        cache.serve(cache.origin_uri, "--mode", "writeback"),
    ):
        cache.ask("message", NAME, "0", "migration_threshold", "0")
        image = cache.dirty(8)
        failing.touch()
        argv = [NBDTARGET, "uncache", NAME, "--control", str(cache.control)]
        told = cache.work / "told"
        with told.open("w") as stderr:
            first = subprocess.Popen(argv, stderr=stderr)
        try:
            cache.wait(lambda fields: bool(fields.get("errors")))
            first.send_signal(signal.SIGINT)
            first.wait(PATIENCE_S)
        finally:
            first.kill()
            first.wait()
        said = told.read_text()
        assert first.returncode == 130
        assert f"{NAME}: 8 dirty blocks to write back" in said
        assert f"{NAME}: interrupted; 8 dirty blocks left" in said
        assert " 2 writethrough dirty_log cleaner " in cache.ask("table", NAME)
        assert cache.read_all() == image
        assert cache.origin.read_bytes() == cache.content

        failing.unlink()
        cache.ask("uncache", NAME)
        assert cache.read_all() == image
    assert cache.origin.read_bytes() == image


@needs("nbdkit")
def test_origin_that_fails_for_good_ends_it(cache: CacheUnderTest) -> None:
    """After EIO no flush of the origin can be trusted: no further block counts as written back."""
    failing = cache.work / "failing"

    def heal() -> None:
        cache.wait(lambda fields: bool(fields.get("errors")))
        failing.unlink()

    errors = ("error-pwrite=EIO", "error-pwrite-rate=100%", f"error-file={failing}")
    with cache.remote_origin("--filter=error", *errors):
        argv = ("--mode", "writeback")
        with cache.serve(cache.origin_uri, *argv, status=1):
            cache.ask("message", NAME, "0", "migration_threshold", "0")
            image = cache.dirty(8)
            failing.touch()
            healing = threading.Thread(target=heal)
            healing.start()
            said = cache.ask("uncache", NAME, status=1)
            healing.join()
            assert "a flush of the origin fails" in said
            assert "nothing has been changed" in said
            assert cache.ask("table", NAME).split()[2] == "cache"
        # A restart with the same line is enough.
        with cache.serve(cache.origin_uri, *argv):
            assert cache.read_all() == image
            cache.ask("uncache", NAME)
    assert cache.origin.read_bytes() == image


@needs("nbdkit")
def test_read_only_origin_is_refused(cache: CacheUnderTest) -> None:
    argv = [NBDTARGET, "cache", cache.origin_uri, str(cache.cache)]
    argv += ["--cache-size", "4M", "--listen", f"unix:{cache.socket}"]
    with cache.remote_origin("--readonly"):
        said = client(*argv, status=1)
    assert "read-only" in said
    assert not cache.cache.exists()


def test_unclean_stop_is_told_and_only_dirty_blocks_are_dirty(
    cache: CacheUnderTest,
) -> None:
    with cache.serve(str(cache.origin), "--mode", "writeback") as process:
        cache.ask("message", NAME, "0", "migration_threshold", "0")
        image = cache.dirty(5)
        cache.ask("message", NAME, "0", "warm", "20-30")
        cache.wait(lambda fields: fields["cache_blocks_used"] == 15)
        cache.ask("status", NAME)  # commits
        process.kill()
        process.child.returncode = 0  # as if it had ended well
    with cache.serve(str(cache.origin), "--mode", "writeback"):
        deadline = time.monotonic() + PATIENCE_S
        told = "not shut down cleanly: 5 blocks (320.0 KiB) count as dirty"
        while told not in cache.log.read_text():
            assert time.monotonic() < deadline, cache.log.read_text()
            time.sleep(0.05)
        assert cache.read_all() == image
        cache.ask("uncache", NAME)
    assert cache.origin.read_bytes() == image
