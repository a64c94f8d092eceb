# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget torture` is ended by a signal: no mount, no loop device and no file is left, and no program that it has started."""

import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.testing.attached import why_not
from nbdtarget.torture.mounts import why_no_mounts
from tests.support.patience import wait_until
from tests.support.processes import NBDTARGET

reason = why_no_mounts("ext4") or (why_not("kernel") and why_not("nbdfuse"))
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)

QUICK = "true"
# They tell where the file system is mounted, and run until the command has gone.
STAYS = 'pwd > "$TOLD.new" && mv "$TOLD.new" "$TOLD"; while kill -0 $PPID; do sleep 0.1; done'
WITH_CHILD = f"({STAYS}); true"
PHASES = {
    "setup": (WITH_CHILD, QUICK, QUICK),
    "program": (QUICK, WITH_CHILD, QUICK),
    "check": (QUICK, QUICK, WITH_CHILD),
}


@pytest.fixture
def told(tmp_path: Path) -> Path:
    return tmp_path / "told"


def start(phase: str, told: Path) -> "subprocess.Popen[bytes]":
    """Start the command, and return when it is in that phase."""
    setup, program, check = PHASES[phase]
    argv = [NBDTARGET, "torture", "--size", "8M", "--cuts", "1"]
    argv += ["--setup", setup, "--check", check, "--", "/bin/sh", "-c", program]
    folder = told.parent / "temporary"
    folder.mkdir()
    environment = {**os.environ, "TMPDIR": str(folder), "TOLD": str(told)}
    process = subprocess.Popen(
        argv,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )

    def is_there() -> bool:
        assert process.poll() is None, f"the command ended with {process.returncode}"
        return told.exists()

    wait_until(is_there)
    return process


def uses(folder: Path) -> Iterator[str]:
    """Yield the mounts below a folder that any process sees, and the loop devices of files below it."""
    for mounts in Path("/proc").glob("[0-9]*/mounts"):
        try:
            text = mounts.read_text()
        except OSError:  # it has just ended
            continue
        yield from (line for line in text.splitlines() if str(folder) in line)
    for backing in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            text = backing.read_text()
        except OSError:  # it has just been released
            continue
        if str(folder) in text:
            yield f"{backing}: {text}"


@pytest.mark.parametrize(
    ("phase", "number"),
    [
        *((phase, signal.SIGTERM) for phase in PHASES),
        ("check", signal.SIGHUP),
        ("check", signal.SIGINT),
    ],
)
def test_ended_in_order(told: Path, phase: str, number: signal.Signals) -> None:
    process = start(phase, told)
    mounted_at = Path(told.read_text().strip())
    folders = [told.parent, mounted_at.parent]
    assert any(True for folder in folders for _ in uses(folder))
    process.send_signal(number)
    assert process.wait() == 128 + number
    wait_until(lambda: not any(list(uses(folder)) for folder in folders))
    assert list((told.parent / "temporary").iterdir()) == []
    assert not mounted_at.parent.exists()
