# SPDX-License-Identifier: Apache-2.0
"""A machine boots from a clone of a qcow2 image that lies on a web server or in an object store, while it is copied.

    python -m scripts.boot_test [--store http|s3]... [--keep FOLDER]

For each store: a Debian with a boot loader (`scripts.vm.cloud_disk`) lies there as `debian-12.qcow2`. `nbdtarget clone URL vm.img` makes it a disk, and firmware in
QEMU boots from that disk at once. While the machine runs and reads, the store goes away and comes back, then the server is killed and started again; QEMU connects
again. When all is copied, the store is ended for good, and the machine boots from `vm.img`. Each step is told with its time. Exit status 1 if
something is not as it should be.

The store is `scripts.store_server`, with 10 ms to the first byte and 100 MiB/s, or moto, an S3 in Python. Without KVM it takes some minutes. The first run makes the image, which needs root.
"""

import argparse
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from scripts.vm.cloud_disk import cloud_disk
from scripts.vm.image import Image, ImageError, image
from scripts.vm.machine import has_kvm, run
from tests.support.processes import NBDTARGET, ServerProcess

STORES: Final = ("http", "s3")
SCRIPT: Final = Path(__file__).with_name("vm") / "boot_from_sources.sh"
RATE: Final = 1 << 20  # of hydration at first: a boot reads what is not there
RECONNECT_S: Final = 120
AWAY_S: Final = 10.0
HYDRATED_S_MAX: Final = 300.0
BOOT_S_MAX: Final = 900.0
S3_ENVIRONMENT: Final = {
    "AWS_ACCESS_KEY_ID": "test",
    "AWS_SECRET_ACCESS_KEY": "test",
    "AWS_DEFAULT_REGION": "us-east-1",
}


class Store:
    """Where the image lies. It can go away and come back on the same port."""

    def __init__(self, kind: str, disk: Path, work: Path) -> None:
        self._kind = kind
        self._disk = disk
        self._work = work
        self._port = _free_port()
        self._server: ServerProcess | None = None

    @property
    def url(self) -> str:
        if self._kind == "http":
            return f"http://127.0.0.1:{self._port}/{self._disk.name}"
        return f"s3://images/{self._disk.name}#endpoint=http://127.0.0.1:{self._port}"

    def start(self) -> None:
        words = [sys.executable, "-m"]
        if self._kind == "http":
            words += ["scripts.store_server", str(self._disk)]
            words += [str(self._work / "port"), f"--port={self._port}"]
            words += ["--latency-ms=10", "--mib-s=100"]
        else:
            words += ["moto.server", "-H", "127.0.0.1", "-p", str(self._port)]
        log = self._work / "store.log"
        self._server = ServerProcess(words, sockets=[], log=log)
        deadline_s = time.monotonic() + 30
        while not _answers(self._port):
            if time.monotonic() > deadline_s:
                raise TimeoutError(log.read_text())
            time.sleep(0.05)
        if self._kind == "s3":
            self._upload()

    def _upload(self) -> None:
        """Put the image there: moto keeps objects in memory."""
        from obstore.store import S3Store

        store = S3Store(
            "images",
            endpoint=f"http://127.0.0.1:{self._port}",
            client_options={"allow_http": True},
            region="us-east-1",
            access_key_id="test",
            secret_access_key="test",
            virtual_hosted_style_request=False,
        )
        bucket = f"http://127.0.0.1:{self._port}/images"
        subprocess.run(
            ["curl", "-sS", "-X", "PUT", bucket], check=True, stdout=subprocess.DEVNULL
        )
        store.put(self._disk.name, self._disk, use_multipart=False)

    def go_away(self) -> str:
        """Be away until `come_back`; return how."""
        assert self._server is not None
        if self._kind == "http":
            self._server.kill()
            return "was killed (SIGKILL)"
        # moto keeps objects in memory: started again it would say that there is no such image, which is an answer.
        self._server.signal(signal.SIGSTOP)
        return "was stopped (SIGSTOP)"

    def come_back(self) -> None:
        assert self._server is not None
        if self._kind == "http":
            self.start()
        else:
            self._server.signal(signal.SIGCONT)

    def end(self) -> None:
        assert self._server is not None
        self._server.kill()


class BootTest:
    def __init__(self, work: Path, made: Image, kind: str) -> None:
        self._work = work
        self._made = made
        self._vm = work / "vm.img"
        self._socket = work / "nbd.sock"
        self._control = str(work / "control.sock")
        self._store = Store(kind, cloud_disk(made), work)
        self._clone: ServerProcess | None = None
        self._begun_s = 0.0

    def say(self, text: str) -> None:
        print(f"{time.monotonic() - self._begun_s:7.1f} s  {text}", flush=True)

    def run(self) -> bool:
        self._store.start()
        self._begun_s = time.monotonic()
        self.say(
            f"$ nbdtarget clone '{self._store.url}' vm.img --hydration-rate {RATE >> 20}M"
        )
        self._start_clone("--hydration-rate", str(RATE))
        self.say(f"it is a disk; {self._status()}")
        self.say(
            "$ qemu-system-x86_64 … (a Debian with its own boot loader, from that disk)"
        )
        node = f"driver=nbd,server.type=unix,server.path={self._socket},export=vm,reconnect-delay={RECONNECT_S}"
        passed = self._boot(node)
        assert self._clone is not None
        stopped = self._clone.terminate(60)
        self._store.end()
        self.say(
            f"the server has ended ({stopped}), and so has the store; vm.img is all that is left"
        )
        node = f"driver=raw,file.driver=file,file.filename={self._vm}"
        return passed and stopped == 0 and self._boot(node)

    def _start_clone(self, *more: str) -> None:
        argv = [
            NBDTARGET,
            "clone",
            self._store.url,
            str(self._vm),
            "--name",
            "vm",
            *more,
        ]
        argv += ["--listen", f"unix:{self._socket}", "--control", self._control]
        self._clone = ServerProcess(
            argv,
            sockets=[self._socket],
            log=self._work / "clone.log",
            env=S3_ENVIRONMENT,
            timeout_s=60,
        )

    def _boot(self, node: str) -> bool:
        status = run(
            self._made,
            SCRIPT,
            has_systemd=True,
            boots_itself=True,
            root_node=node,
            serve=self._serve,
            show=lambda line: self.say(f"    the machine: {line}"),
            console=self._work / "console.log",
            timeout_s=BOOT_S_MAX,
        )
        if status != 0:
            self.say(f"the machine has ended with {status}")
        return status == 0

    def _serve(self, words: str) -> None:
        match words.split():
            case ["up"]:
                self.say(self._status() if self._is_cloning else "no server runs")
            case ["away", "store"]:
                how = self._store.go_away()
                self.say(f"the store {how}; {AWAY_S:.0f} s pass")
                time.sleep(AWAY_S)
                self._store.come_back()
                self.say("the store runs again")
            case ["away", "server"]:
                assert self._clone is not None
                self._clone.signal(signal.SIGKILL)
                self._clone.kill()
                self.say(f"nbdtarget was killed (SIGKILL); {AWAY_S:.0f} s pass")
                time.sleep(AWAY_S)
                self._start_clone("--hydration-rate", str(RATE))
                self.say(f"the same command runs again; {self._status()}")
            case ["hydrate"]:
                begun_s = time.monotonic()
                self._command("message", "vm", "0", "hydration_rate", "0")
                while "(100.0 %)" not in self._status():
                    if time.monotonic() > begun_s + HYDRATED_S_MAX:
                        raise TimeoutError(self._status())
                    time.sleep(0.2)
                self.say(
                    f"without a bound, the rest took {time.monotonic() - begun_s:.1f} s; {self._status()}"
                )
            case _:
                sys.exit(f"boot-test: the script asks for something unknown: {words}")

    @property
    def _is_cloning(self) -> bool:
        return self._clone is not None and self._clone.child.poll() is None

    def _status(self) -> str:
        nr, _, total = self._command("status", "vm", "--line").split()[6].partition("/")
        return f"{100 * int(nr) / int(total):.1f} % are hydrated".replace(
            "100.0 %", "(100.0 %)"
        )

    def _command(self, *words: str) -> str:
        argv = [NBDTARGET, *words, "--control", self._control]
        return subprocess.run(
            argv, check=True, stdout=subprocess.PIPE, text=True
        ).stdout


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def _answers(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--store", action="append", choices=STORES)
    parser.add_argument("--keep", type=Path, help="folder that stays, with all logs")
    options = parser.parse_args(argv)
    try:
        made = image()
        cloud_disk(made)
    except ImageError as error:
        sys.exit(f"boot-test: {error}")
    print(f"machines run {'with KVM' if has_kvm() else 'translated, without KVM'}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="boot-"))
    for kind in options.store or STORES:
        work = folder / kind
        work.mkdir(parents=True)
        print(f"from {kind}:")
        if not BootTest(work, made, kind).run():
            print(f"boot-test: FAILED, see {work}")
            return 1
    if options.keep is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
