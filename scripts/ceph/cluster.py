# SPDX-License-Identifier: Apache-2.0
"""`Cluster`: one monitor and one OSD of Ceph, from Debian's packages, in a folder, on 127.0.0.1 only.

The OSD keeps its objects in a plain file (BlueStore). There is no manager: statistics are missing, and nothing here asks for them. Authentication is off, because
only this machine can connect, and pools have one copy of each object. All of it ends with the process that has started it, also by SIGKILL.
"""

import json
import os
import signal
import socket
import subprocess
import time
import uuid
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from tests.support.processes import ServerProcess

__all__ = ["PACKAGES", "Cluster"]

PACKAGES: Final = {  # program: package of Debian
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph": "ceph-common",
    "rbd": "ceph-common",
    "qemu-nbd": "qemu-utils",
}
ANSWER_S_MAX: Final = 120.0
OSD_BYTES: Final = 2 << 30  # sparse
CONF: Final = """
[global]
fsid = {fsid}
mon host = [v2:127.0.0.1:{port}/0]
auth cluster required = none
auth service required = none
auth client required = none
public addr = 127.0.0.1
cluster addr = 127.0.0.1
ms bind ipv6 = false
osd pool default size = 1
osd pool default min size = 1
mon allow pool size one = true
mon data avail warn = 1
mon data avail crit = 1
osd crush chooseleaf type = 0
run dir = {work}
log file = {work}/$name.log
admin socket = {work}/$name.$pid.asok
pid file = {work}/$name.pid
[mon]
mon data = {work}/mon
mon cluster log file = {work}/cluster.log
[osd]
osd data = {work}/osd.0
osd objectstore = bluestore
bluestore block size = {osd_bytes}
bluestore block create = true
osd memory target = 939524096
bluestore cache autotune = false
bluestore cache size = 67108864
[client]
log file = /dev/null
admin socket =
"""


class Cluster:
    """See the module head.

    Attributes:
        conf: Ceph's configuration file, which clients need.
        osd: the process; it may be signalled, killed, and started again with `start_osd`.
    """

    def __init__(self, work: Path) -> None:
        """Make the cluster and start it. Raises: RuntimeError."""
        work.mkdir()
        self._work = work
        self.conf = work / "ceph.conf"
        fsid = str(uuid.uuid4())
        port = _free_port()
        text = CONF.format(fsid=fsid, port=port, work=work, osd_bytes=OSD_BYTES)
        self.conf.write_text(text)
        monmap = str(work / "monmap")
        address = ["--addv", "a", f"[v2:127.0.0.1:{port}]"]
        _run("monmaptool", "--create", "--fsid", fsid, *address, monmap)
        mon = ["ceph-mon", "-c", str(self.conf), "-i", "a"]
        _run(*mon, "--mkfs", "--monmap", monmap)
        self._mon = ServerProcess([*mon, "-f"], sockets=[], log=work / "mon.out")
        try:
            self.ceph("status")
            (work / "osd.0").mkdir()
            osd_id = str(uuid.uuid4())
            self.ceph("osd", "new", osd_id)
            _run(*self._osd_words, "--mkfs", "--osd-uuid", osd_id)
            self.start_osd()
            self.ceph("osd", "pool", "create", "images", "8")
            self.rbd("pool", "init", "images")
        except BaseException:
            self.close()
            raise

    osd: ServerProcess | None = None

    @property
    def _osd_words(self) -> tuple[str, ...]:
        return ("ceph-osd", "-c", str(self.conf), "-i", "0")

    def start_osd(self) -> None:
        """Start the OSD, and wait until the monitor counts on it."""
        log = self._work / "osd.out"
        self.osd = ServerProcess([*self._osd_words, "-f"], sockets=[], log=log)
        deadline_s = time.monotonic() + ANSWER_S_MAX
        while not json.loads(self.ceph("osd", "dump"))["osds"][0]["up"]:
            if time.monotonic() > deadline_s:
                raise TimeoutError(log.read_text())
            time.sleep(0.2)

    def ceph(self, *words: str) -> str:
        argv = ["ceph", "-c", str(self.conf), "--connect-timeout", "60"]
        return _run(*argv, *words, "--format", "json")

    def rbd(self, *words: str) -> str:
        return _run("rbd", "-c", str(self.conf), *words)

    def info(self, image: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.rbd("info", image, "--format", "json"))
        return found

    def close(self) -> None:
        for process in (self.osd, self._mon):
            if process is not None:
                process.signal(signal.SIGCONT)  # it may be stopped
                process.kill()

    def __enter__(self) -> "Cluster":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def _run(*argv: str) -> str:
    """Raises: RuntimeError, with what it printed."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=ANSWER_S_MAX,
        env={**os.environ, "CEPH_ARGS": ""},
    )
    if done.returncode:
        raise RuntimeError(
            f"{' '.join(argv)}: exit {done.returncode}\n{done.stdout}{done.stderr}"
        )
    return done.stdout


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port
