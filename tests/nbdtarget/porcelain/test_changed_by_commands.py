# SPDX-License-Identifier: Apache-2.0
"""A command removes or renames the disk that `clone`, `cache` or `export` serves. Real processes: a job that goes wrong keeps its whole process busy."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import NBDTARGET, ServerProcess

MIB = 1 << 20
JOBS = {
    "clone": ["clone", "source.img", "disk.img"],
    "cache": ["cache", "source.img", "disk.img"],
    "export": ["export", "disk.img"],
}
SCRATCH = ["scratch", "disk.img", "-n", "2"]


class Served:
    """A job, and its control socket."""

    def __init__(self, folder: Path, kind: str) -> None:
        given = JOBS.get(kind, SCRATCH)
        words = [str(folder / w) if w.endswith(".img") else w for w in given]
        self.log, control = folder / "log", folder / "control.sock"
        nbd = folder / "nbd.sock"
        options = ["--name", "d", "--control", str(control), "--listen", f"unix:{nbd}"]
        self.process = ServerProcess(
            [NBDTARGET, *words, *options], sockets=[nbd], log=self.log
        )
        self._client = ControlClient(control)

    def remove(self, name: str) -> None:
        self._client.ask("remove", m.Remove(name), m.Done)

    def create(self, name: str, table: str) -> None:
        self._client.ask("create", m.Create(name, table), m.Done)

    def rename(self, name: str, new_name: str) -> None:
        self._client.ask("rename", m.Rename(name, new_name), m.Done)

    def upgrade(self) -> int:
        """Returns the number of the new process."""
        return self._client.ask("upgrade", m.Upgrade(), m.UpgradeAnswer).pid

    def names(self) -> list[str]:
        answer = self._client.ask("info", m.Info(), m.InfoAnswer)
        return [device.name for device in answer.devices]


@pytest.fixture(params=list(JOBS))
def served(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Served]:
    for name in ("source.img", "disk.img"):
        (tmp_path / name).write_bytes(bytes(MIB))
    made = Served(tmp_path, request.param)
    yield made
    made.process.kill()


def test_the_command_ends_when_its_disk_is_removed(served: Served) -> None:
    served.remove("d")
    assert served.process.wait(PATIENCE_S) == 0
    assert "d was removed, and no device is left to serve" in served.log.read_text()


def test_other_disks_are_served_on(served: Served) -> None:
    served.create("other", "0 8 zero")
    served.remove("d")
    assert served.names() == ["other"]
    said = "d was removed; other devices are served on, until the last one is removed"
    wait_until(lambda: said in served.log.read_text())
    with pytest.raises(NbdTargetError, match="d was removed, and it is what this"):
        served.upgrade()
    assert served.names() == ["other"]
    assert served.process.terminate() == 0


def test_the_command_ends_with_the_last_of_other_disks(served: Served) -> None:
    served.create("other", "0 8 zero")
    served.create("another", "0 8 zero")
    served.remove("d")
    served.rename("other", "third")
    served.remove("another")
    assert served.names() == ["third"]
    served.remove("third")
    assert served.process.wait(PATIENCE_S) == 0
    assert "the last device was removed, and none is left" in served.log.read_text()


def test_a_renamed_disk_is_handed_over(served: Served) -> None:
    served.rename("d", "e")
    pid = served.upgrade()
    assert served.process.wait(PATIENCE_S) == 0
    assert served.names() == ["e"]
    served.remove("e")
    wait_until(lambda: "e was removed" in served.log.read_text())
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_scratch_ends_with_the_last_of_its_copies(tmp_path: Path) -> None:
    (tmp_path / "disk.img").write_bytes(bytes(MIB))
    served = Served(tmp_path, "scratch")
    try:
        served.remove("d-1")
        assert served.names() == ["d-2"]
        served.remove("d-2")
        assert served.process.wait(PATIENCE_S) == 0
        assert "the last device was removed, and none is left" in served.log.read_text()
    finally:
        served.process.kill()
