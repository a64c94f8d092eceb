# SPDX-License-Identifier: Apache-2.0
"""Recording a program: what it printed, what it wrote, and what is said if it fails."""

from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.testing.attached import why_not
from nbdtarget.torture.mounts import why_no_mounts
from nbdtarget.torture.recorder import record
from nbdtarget.torture.recording import Recording, RecordingFiles, read_epochs
from tests.support.patience import PATIENCE_S

reason = why_no_mounts("ext4") or (why_not("kernel") and why_not("nbdfuse"))
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


def recorded(
    directory: Path,
    command: str,
    *,
    setup: str | None = None,
    timeout_s: float = PATIENCE_S,
) -> Recording:
    return record(
        RecordingFiles(directory),
        size=8 << 20,
        file_system="ext4",
        setup=setup,
        command=["/bin/sh", "-c", command],
        check="true",
        timeout_s=timeout_s,
    )


def test_lines_and_writes_are_recorded(tmp_path: Path) -> None:
    command = "test -e made && echo one && echo data > file && sync && echo two"
    recording = recorded(tmp_path, command, setup="touch made")
    assert recording.lines == ("one", "two")
    files = RecordingFiles(tmp_path)
    assert Recording.load(files) == recording
    epochs, nr_epochs = read_epochs(files.log)
    assert epochs[nr_epochs - 1].nr_lines == 2
    assert sum(len(epoch.writes) for epoch in epochs[:nr_epochs]) > 1
    assert not files.disk.exists()


@pytest.mark.parametrize(
    ("command", "setup", "said"),
    [
        ("exit 3", None, "/bin/sh: status 3, although the power was never cut"),
        ("true", "echo no; exit 4", "--setup: status 4: no"),
    ],
)
def test_failure_without_a_cut_is_said(
    tmp_path: Path, command: str, setup: str | None, said: str
) -> None:
    with pytest.raises(NbdTargetError, match=said):
        recorded(tmp_path, command, setup=setup)
    assert list((tmp_path / "mnt").iterdir()) == []  # it is unmounted


def test_program_that_does_not_end_is_ended(tmp_path: Path) -> None:
    with pytest.raises(NbdTargetError, match=r"did not end within 0\.2 s"):
        recorded(tmp_path, "sleep 60", timeout_s=0.2)
