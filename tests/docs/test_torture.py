# SPDX-License-Identifier: Apache-2.0
"""The page on torture: its SQLite programs show what the page says, in the small."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.testing.attached import why_not
from nbdtarget.torture.mounts import why_no_mounts
from tests.support.places import ROOT
from tests.support.processes import NBDTARGET

PAGE = (ROOT / "docs/how-to/torture.md").read_text()
PROGRAM, CHECK = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)

reason = why_no_mounts("ext4") or (why_not("kernel") and why_not("nbdfuse"))
pytestmark = pytest.mark.skipif(bool(reason), reason=reason)


@pytest.mark.parametrize(
    ("journal", "synchronous", "status"),
    [("wal", "full", 0), pytest.param("wal", "off", 1, marks=pytest.mark.long)],
)
def test_sqlite(tmp_path: Path, journal: str, synchronous: str, status: int) -> None:
    (tmp_path / "commit.py").write_text(PROGRAM.replace("range(30)", "range(4)"))
    (tmp_path / "check.py").write_text(CHECK)
    record = tmp_path / "record"
    command = [NBDTARGET, "torture", "--size", "16M", "--cuts", "8"]
    command += ["--check", f"{sys.executable} {tmp_path}/check.py"]
    command += ["--output", str(record)]
    program = [sys.executable, str(tmp_path / "commit.py"), journal, synchronous]
    done = subprocess.run(
        [*command, "--", *program], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == status, done.stdout + done.stderr
    assert "and 4 lines" in done.stderr
    if status:
        assert "rows were acknowledged" in done.stdout
        replay = [NBDTARGET, "torture", "--replay", str(record / "case-1.json")]
        again = subprocess.run(replay, capture_output=True, text=True)
        assert again.returncode == 1
        assert "rows were acknowledged" in again.stdout
