# SPDX-License-Identifier: Apache-2.0
"""Kernel clients against a server on this machine, in virtual machines that run a real Debian.

    python -m scripts.vm_test [--only NAME]... [--list] [--keep FOLDER] [--with-kvm-only]

Each test is a script in `scripts/vm/tests`, which runs as root in a machine (`scripts.vm.machine`). Its disks are those of a server that
runs here, outside the machine. Prints what the scripts print and how long each took. Exit status 1 if one fails: what
the kernel and the server said is in FOLDER then, and without --keep in a temporary folder that is kept.

With KVM it takes about a minute. Without it the guests' code is translated, which takes about eight minutes on two cores; --with-kvm-only does
nothing then, and says so. The first run makes the image (`scripts.vm.image`), which needs root. If the packages for it cannot be had,
--with-kvm-only says so and does nothing.
"""

import argparse
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

from nbdtarget import __version__
from scripts.build_deb import DebError, build_deb
from scripts.vm.image import Image, ImageError, PackagesError, image
from scripts.vm.machine import has_kvm, run
from tests.support.certificates import authority
from tests.support.processes import NBDTARGET, ServerProcess

MIB: Final = 1 << 20
SIZE: Final = 320 * MIB  # xfs wants 300
CACHE_SIZE: Final = 64 * MIB
STOP_S_MAX: Final = 90.0
SCRIPTS: Final = Path(__file__).with_name("vm") / "tests"


class Host:
    """The server, and what scripts ask of it."""

    def __init__(self, work: Path, image: Image, *, is_tcp: bool) -> None:
        self._work = work
        self._tcp = f"127.0.0.1:{_free_port()}" if is_tcp else ""
        self._image = image
        self.socket = work / "nbd.sock"
        self._control = work / "control.sock"
        self._server: ServerProcess | None = None
        self._heir = 0  # the process that has taken over

    def start(self, devices: tuple[str, ...]) -> None:
        """Start the server with some of the devices of `_table`."""
        self._devices = devices
        config = self._work / "disks.toml"
        listen = f'"unix:{self.socket}"'
        if self._tcp:
            tls = f'tls = "on", tls_certificates = "{self.certificates}"'
            listen = f'{{ address = "tcp:{self._tcp}", {tls} }}, {listen}'
        lines = [f"listen = [{listen}]", f'control = "{self._control}"']
        for name in devices:
            lines += [f"[device.{name}]", f'table = "{self._table(name)}"']
        config.write_text("\n".join(lines) + "\n")
        self._server = ServerProcess(
            [NBDTARGET, "serve", "--config", str(config)],
            sockets=[self.socket],
            log=self._work / "server.log",
        )

    @property
    def certificates(self) -> Path:
        """The server's, with that of their authority."""
        return authority()[1]

    @property
    def address(self) -> str:
        """Where the guest's connections go."""
        return self._tcp or str(self.socket)

    def _table(self, name: str) -> str:
        work, sectors = self._work, SIZE // 512
        for each, size in (("dest", SIZE), ("origin", SIZE), ("fast", CACHE_SIZE)):
            _make_sparse(work / f"{each}.img", size)
        _make_sparse(work / "disk.img", SIZE)
        _make_sparse(work / "source.img", SIZE)
        match name:
            case "clone":
                rate = "2 hydration_rate 8388608"
                return f"0 {sectors} clone {work}/clone.meta {work}/dest.img {work}/source.img 128 0 {rate}"
            case "cache":
                words = "128 2 writeback dirty_log smq 0"
                return f"0 {sectors} cache {work}/cache.meta {work}/fast.img {work}/origin.img {words}"
            case "powercut":
                return f"0 {sectors} powercut {work}/disk.img 0"
        root = self._image.root
        _make_sparse(work / "root.img", root.stat().st_size)
        sectors = root.stat().st_size // 512
        return f"0 {sectors} clone {work}/root.meta {work}/root.img {root} 128 0 2 hydration_rate 8388608"

    def serve(self, words: str) -> None:
        """Do what a script asks for. Raises: subprocess.CalledProcessError."""
        match words.split():
            case ["message", *rest]:
                self._command("message", rest[0], "0", *rest[1:])
            case ["status", name]:
                print("  ", self._command("status", name).strip())
            case ["kill", seconds]:
                assert self._server is not None
                self._server.kill()
                time.sleep(float(seconds))  # the server is away for so long
                self.start(self._devices)
            case ["upgrade"]:
                self._heir = json.loads(self._command("upgrade", "--json"))["pid"]
            case _:
                sys.exit(f"vm-test: a script asks for something unknown: {words}")

    def _command(self, *words: str) -> str:
        argv = [NBDTARGET, *words, "--control", str(self._control)]
        return subprocess.run(
            argv, check=True, stdout=subprocess.PIPE, text=True
        ).stdout

    def stop(self) -> int:
        """End the server in order. Returns its exit status; 0 for one that is not our child."""
        assert self._server is not None
        if self._heir:
            watched = os.pidfd_open(self._heir)
            signal.pidfd_send_signal(watched, signal.SIGTERM)
            if not select.select([watched], [], [], STOP_S_MAX)[0]:
                sys.exit(f"vm-test: process {self._heir} does not end")
        return self._server.terminate(STOP_S_MAX)


def _free_port() -> int:
    """A port that a server can listen on again and again."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


def _make_sparse(path: Path, size: int) -> None:
    if not path.exists():
        with path.open("wb") as file:
            file.truncate(size)


class VmTest(NamedTuple):
    """One machine.

    Attributes:
        devices: those of its server.
        is_tcp: the server is reached over TCP, where it also speaks TLS; else over a unix socket.
        is_root_served: its root disk is the device `root`, by QEMU's own NBD client.
        has_package: the Debian package lies beside the script.
        has_certificates: those of a server and of its authority lie beside the script.
        has_systemd: the machine boots as usual, and its root disk stays over all boots.
        nr_boots: the script runs so often, each time with a new machine and a new server on the same disks.
    """

    name: str
    devices: tuple[str, ...]
    is_tcp: bool = False
    is_root_served: bool = False
    has_package: bool = False
    has_certificates: bool = False
    has_systemd: bool = False
    nr_boots: int = 1


TESTS: Final = (
    VmTest("filesystems", ("clone", "cache", "powercut")),
    VmTest("powercut", ("powercut",)),
    VmTest("stack", ("clone", "cache")),
    VmTest("upgrade", ("clone", "cache")),
    VmTest("killed", ("clone", "cache"), is_tcp=True),
    VmTest("tcp", ("clone", "cache"), is_tcp=True),
    VmTest("root", ("root",), is_root_served=True, nr_boots=2),
    VmTest("vsock", (), has_package=True, has_certificates=True),
    VmTest("systemd", (), has_package=True, has_systemd=True, nr_boots=3),
)


def run_test(test: VmTest, image: Image, work: Path) -> bool:
    """Run one test. Returns whether it has passed."""
    return all(boot(test, image, work) for _ in range(test.nr_boots))


def boot(test: VmTest, image: Image, work: Path) -> bool:
    """Run a test's script once. Returns whether it has passed."""
    host = Host(work, image, is_tcp=test.is_tcp)
    host.start(test.devices)
    files = [_package(work)] if test.has_package else []
    if test.is_tcp or test.has_certificates:
        files.append(host.certificates / "ca-cert.pem")
    if test.has_certificates:
        names = ("server-cert.pem", "server-key.pem")
        files += [host.certificates / name for name in names]
    uri = f"driver=nbd,server.type=unix,server.path={host.socket},export=root"
    status = run(
        image,
        SCRIPTS / f"{test.name}.sh",
        server=host.address,
        files=files,
        has_systemd=test.has_systemd,
        root=work / "root.qcow2" if test.has_systemd else None,
        root_node=uri if test.is_root_served else None,
        serve=host.serve,
        show=lambda line: print("  ", line, flush=True),
        console=work / "console.log",
    )
    stopped = host.stop()
    if status != 0 or stopped != 0:
        print(f"   the script ended with {status}, the server with {stopped}")
    return status == 0 and stopped == 0


def _package(work: Path) -> Path:
    """The Debian package, built once."""
    package = work / "nbdtarget.deb"
    if not package.exists():
        build_deb(work, f"{__version__}-1").rename(package)
    return package


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--with-kvm-only", action="store_true")
    options = parser.parse_args(argv)
    names = [test.name for test in TESTS]
    if options.list:
        print("\n".join(names))
        return 0
    if unknown := set(options.only) - set(names):
        parser.error(f"no test {', '.join(sorted(unknown))}; there are {names}")
    if options.with_kvm_only and (os.geteuid() != 0 or not has_kvm()):
        why = "this machine has no KVM" if os.geteuid() == 0 else "not root"
        print(f"skipping the tests in virtual machines ({why}); make vm-test runs them")
        return 0
    try:
        made = image()
    except ImageError as error:
        if options.with_kvm_only and isinstance(error, PackagesError):
            print(f"skipping the tests in virtual machines: {error}")
            return 0
        sys.exit(f"vm-test: {error}")
    print(f"machines run {'with KVM' if has_kvm() else 'translated, without KVM'}")
    folder = options.keep or Path(tempfile.mkdtemp(prefix="vm-test-"))
    failed = []
    for test in TESTS:
        if options.only and test.name not in options.only:
            continue
        work = folder / test.name
        work.mkdir(parents=True, exist_ok=True)
        begun = time.monotonic()
        print(test.name, flush=True)
        try:
            has_passed = run_test(test, made, work)
        except DebError as error:
            sys.exit(f"vm-test: {error}")
        verdict = "passed" if has_passed else f"FAILED, see {work}"
        print(f"{test.name}: {verdict} after {time.monotonic() - begun:.0f} s")
        if not has_passed:
            failed.append(test.name)
    if failed:
        return 1
    if options.keep is None:
        shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
