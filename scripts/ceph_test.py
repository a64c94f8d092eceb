# SPDX-License-Identifier: Apache-2.0
"""RBD images of a real cluster of Ceph as sources of clones and as origins of caches.

    python -m scripts.ceph_test [--keep FOLDER]

Starts a cluster of one monitor and one OSD on this machine (`scripts.ceph.cluster`), and tells what it does, step by step. Exit status 1 if something is not as it
should be. As root on Debian it installs the packages that are missing. It takes about a minute and a half.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from scripts.ceph.cluster import PACKAGES, Cluster
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

MIB: Final = 1 << 20
SIZE: Final = 128 * MIB
AWAY_S: Final = 5.0
LIBRARIES: Final = "qemu-block-extra"  # QEMU's block driver for RBD has no program


class CephTest:
    def __init__(self, work: Path, cluster: Cluster) -> None:
        self._work = work
        self._cluster = cluster
        self._begun_s = time.monotonic()
        self._control = str(work / "control.sock")
        self._socket = work / "nbd.sock"
        self.content = self._make_images()

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun_s:6.1f} s  {text}", flush=True)

    def _name(self, image: str) -> str:
        return f"rbd:images/{image}#conf={self._cluster.conf}"

    def _make_images(self) -> bytes:
        """An image with data and holes, a snapshot of it, and other data written behind the snapshot."""
        data = random.Random(3).randbytes(24 * MIB)
        pieces = [data[: 16 * MIB], bytes(48 * MIB), data[16 * MIB :], bytes(56 * MIB)]
        content = b"".join(pieces)
        assert len(content) == SIZE
        path = self._work / "golden.raw"
        path.write_bytes(content)
        self._cluster.rbd("import", str(path), "images/golden")
        self._cluster.rbd("snap", "create", "images/golden@one")
        self._cluster.rbd(
            "bench",
            "images/golden",
            *["--io-type", "write", "--io-total", "4M", "--io-threads", "1"],
        )
        return content

    def _command(self, *words: str) -> str:
        return subprocess.run(
            [NBDTARGET, *words], check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    @contextmanager
    def _serving(self, *words: str) -> Iterator[ServerProcess]:
        argv = [NBDTARGET, *words, "--name", "d", "--control", self._control]
        argv += ["--listen", f"unix:{self._socket}"]
        log = self._work / "server.log"
        with ServerProcess(argv, sockets=[self._socket], log=log) as server:
            yield server

    def _refused(self, *words: str) -> str:
        argv = [NBDTARGET, *words, "--control", self._control]
        done = subprocess.run(argv, stderr=subprocess.PIPE, text=True, timeout=60)
        check(done.returncode != 0, f"{words} was not refused")
        return done.stderr.strip()

    def _status(self, name: str) -> str:
        return self._command("status", name, "--line", "--control", self._control)

    def clone_of_a_snapshot(self) -> None:
        dest = self._work / "one.img"
        line = ["clone", self._name("golden@one"), str(dest), "--exit-when-hydrated"]
        begun_s = time.monotonic()
        with self._serving(*line) as server:
            server.wait(120)
        check(dest.read_bytes() == self.content, "the clone differs from the snapshot")
        used = dest.stat().st_blocks * 512
        check(used <= 32 * MIB, f"{used} bytes are used: holes were copied")
        seconds = time.monotonic() - begun_s
        self.say(
            f"clone of golden@one: hydrated in {seconds:.1f} s, equal byte for byte; {used >> 20} of {SIZE >> 20} MiB are used"
        )
        told = self._command("metadata", "info", f"{dest}.nbdtarget")
        (source,) = [each for each in told.splitlines() if each.startswith("Source:")]
        image_id = self._cluster.info("images/golden")["id"]
        check(f"image-id={image_id}, snapshot-id=" in source, source)
        self.say(source)

    def qemus_own_name(self) -> None:
        name = f"qemu:raw:rbd:images/golden@one:conf={self._cluster.conf}"
        with self._serving("export", "--readonly", name), self._client() as client:
            check(
                client.read(63 * MIB, 2 * MIB) == self.content[63 * MIB : 65 * MIB],
                "export",
            )
        self.say("export of qemu:raw:rbd:images/golden@one: the same bytes")

    def _client(self) -> PlainClient:
        return PlainClient(self._socket, "d", timeout_s=120)

    def cluster_and_helper_that_go_away(self) -> None:
        dest = self._work / "two.img"
        line = ["clone", self._name("golden@one"), str(dest), "--hydration-rate", "2M"]
        with self._serving(*line) as server, self._client() as client:
            check(client.read(0, MIB) == self.content[:MIB], "the first read")
            osd = self._cluster.osd
            assert osd is not None
            osd.signal(signal.SIGSTOP)
            self._reads_wait(
                client,
                12 * MIB,
                lambda: osd.signal(signal.SIGCONT),
                f"the OSD was stopped for {AWAY_S:.0f} s",
            )
            osd.kill()
            self._reads_wait(
                client,
                68 * MIB,
                self._cluster.start_osd,
                "the OSD was killed and started again",
            )
            for pid in helpers(server.pid):
                os.kill(pid, signal.SIGKILL)
            begun_s = time.monotonic()
            check(
                client.read(70 * MIB, MIB) == self.content[70 * MIB : 71 * MIB],
                "helper",
            )
            self.say(
                f"qemu-nbd was killed: the next read was answered after {time.monotonic() - begun_s:.1f} s by another one, without an error"
            )
            self._command(
                "message", "d", "0", "hydration_rate", "0", "--control", self._control
            )
            deadline_s = time.monotonic() + 120
            while f" {SIZE >> 16}/{SIZE >> 16} " not in self._status("d"):
                check(time.monotonic() < deadline_s, self._status("d"))
                time.sleep(0.1)
            check(server.terminate(60) == 0, "the server's exit status")
        check(dest.read_bytes() == self.content, "the clone differs after all that")
        self.say(
            "the clone was hydrated to its end all the same, and is equal byte for byte"
        )

    def _reads_wait(
        self, client: PlainClient, at: int, bring_back: Callable[[], None], what: str
    ) -> None:
        """Read while something is away for a while."""
        found: list[bytes] = []
        begun_s = time.monotonic()
        # Not the other way round: a process ends with the thread that has started it.
        reading = threading.Thread(target=lambda: found.append(client.read(at, MIB)))
        reading.start()
        time.sleep(AWAY_S)
        check(reading.is_alive(), f"{what}: the read did not wait")
        bring_back()
        reading.join()
        waited_s = time.monotonic() - begun_s
        check(found == [self.content[at : at + MIB]], what)
        self.say(f"{what}: a read waited {waited_s:.1f} s, and got its data")

    def image_that_was_replaced(self) -> None:
        cluster, dest = self._cluster, self._work / "three.img"
        cluster.rbd("snap", "create", "images/golden@two")
        other = self._work / "other.raw"
        other.write_bytes(bytes(SIZE))
        cluster.rbd("import", str(self._work / "golden.raw"), "images/web")
        cluster.rbd("snap", "create", "images/web@s")
        line = ["clone", self._name("web@s"), str(dest), "--hydration-rate", "2M"]
        with self._serving(*line) as server, self._client() as client:
            check(client.read(0, MIB) == self.content[:MIB], "the first read")
            cluster.rbd("snap", "purge", "images/web")
            # The helper watches the image, so it is renamed; a new one gets its name.
            cluster.rbd("mv", "images/web", "images/old")
            cluster.rbd("import", str(other), "images/web")
            cluster.rbd("snap", "create", "images/web@s")
            for pid in helpers(server.pid):
                os.kill(pid, signal.SIGKILL)
            deadline_s = time.monotonic() + 60
            while not (changed := self._changed()):
                check(time.monotonic() < deadline_s, "the other image was not noticed")
                time.sleep(0.1)
            self.say(f"images/web was replaced while it was copied: {changed}")
            check("image-id" in changed, changed)
            server.terminate(60)
        told = self._refused(*line)
        check("its image-id is" in told, told)
        self.say(f"the next start: {told}")

    def _changed(self) -> str:
        told = self._command("status", "d", "--json", "--control", self._control)
        found = re.search(r'"source_changed": ?"([^"]+)"', told)
        return found[1] if found else ""

    def image_that_is_written_to(self) -> None:
        argv = ["qemu-nbd", "-t", "-f", "raw", "-k", str(self._work / "w.sock")]
        argv += [f"rbd:images/golden:conf={self._cluster.conf}"]
        with (
            ServerProcess(
                argv, sockets=[self._work / "w.sock"], log=self._work / "w.log"
            ),
            PlainClient(self._work / "w.sock") as writer,
        ):
            writer.write(0, b"x" * 4096)
            told = self._refused(
                "clone", self._name("golden"), str(self._work / "x.img")
            )
        check("another client writes to the image" in told, told)
        self.say(f"an image that is written to: {told}")
        check(not (self._work / "x.img").exists(), "a refused clone left its file")

    def origin_of_a_cache(self) -> None:
        fast = self._work / "fast.img"
        line = ["cache", self._name("golden@one"), str(fast), "--cache-size", "32M"]
        with self._serving(*line) as server, self._client() as client:
            for _ in range(3):
                for at in range(0, SIZE, 4 * MIB):
                    check(
                        client.read(at, 4 * MIB) == self.content[at : at + 4 * MIB],
                        "cache",
                    )
            self.say(
                f"cache of golden@one, all read three times: {self._status('d').strip()}"
            )
            check(server.terminate(60) == 0, "the server's exit status")

    def run(self) -> None:
        self.say("a cluster with images/golden and its snapshot is there")
        self.clone_of_a_snapshot()
        self.qemus_own_name()
        self.cluster_and_helper_that_go_away()
        self.image_that_is_written_to()
        self.image_that_was_replaced()
        self.origin_of_a_cache()
        self.say("all is as it should be")


def check(condition: bool, what: str) -> None:
    if not condition:
        raise AssertionError(what)


def helpers(parent: int) -> list[int]:
    """The children of a process that are called qemu-nbd."""
    found = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            status = (entry / "status").read_text()
        except OSError:
            continue  # it has just ended
        if f"\nPPid:\t{parent}\n" in status and "Name:\tqemu-nbd\n" in status:
            found.append(int(entry.name))
    return found


def install() -> None:
    """Install what is missing, if we may. Exits if something is."""
    missing = {
        package for program, package in PACKAGES.items() if not shutil.which(program)
    }
    known = (
        subprocess.run(["qemu-img", "--help"], stdout=subprocess.PIPE, text=True)
        if shutil.which("qemu-img")
        else None
    )
    if known is None or " rbd" not in known.stdout:
        missing.add(LIBRARIES)
    if not missing:
        return
    words = [
        "apt-get",
        "install",
        "-qq",
        "-y",
        "--no-install-recommends",
        *sorted(missing),
    ]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        sys.exit(
            f"ceph-test: not installed: {', '.join(sorted(missing))} (`{' '.join(words)}' as root)"
        )
    subprocess.run(
        words,
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
    )


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="folder that stays, with all logs")
    options = parser.parse_args(argv)
    install()
    work = options.keep or Path(tempfile.mkdtemp(prefix="ceph-"))
    work.mkdir(exist_ok=True)
    begun_s = time.monotonic()
    try:
        with Cluster(work / "cluster") as cluster:
            print(
                f"a cluster of one monitor and one OSD was up after {time.monotonic() - begun_s:.1f} s"
            )
            CephTest(work, cluster).run()
    except AssertionError as error:
        print(f"ceph-test: FAILED: {error}; see {work}")
        return 1
    if options.keep is None:
        shutil.rmtree(work)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
