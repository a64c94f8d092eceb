# SPDX-License-Identifier: Apache-2.0
"""The page on pytest: its test finds the bug as the page shows, and passes when the bug is mended."""

import subprocess
import sys
from pathlib import Path

import pytest

from nbdtarget.testing.attached import why_not
from tests.support.pytest_page import BUG, MENDED, OTHERS, PRINTED, WRITE

needs_nbdfuse = pytest.mark.skipif(bool(why_not("nbdfuse")), reason=why_not("nbdfuse"))


def run(tmp_path: Path, *suites: str) -> str:
    (tmp_path / "images").mkdir()
    (tmp_path / "images/golden.img").write_bytes(bytes(4096))
    for nr, suite in enumerate(suites):
        (tmp_path / f"test_{nr}.py").write_text(suite)
    command = [sys.executable, "-m", "pytest", "-p", "nbdtarget.testing.plugin"]
    command += ["-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:asyncio"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    return done.stdout


@needs_nbdfuse
def test_ten_lines_find_the_bug(tmp_path: Path) -> None:
    assert len(BUG.strip().replace("\n\n", "\n").splitlines()) <= 10
    printed = run(tmp_path, BUG)
    for line in PRINTED.splitlines():
        assert line in printed


@needs_nbdfuse
def test_examples_pass_when_the_bug_is_mended(tmp_path: Path) -> None:
    assert BUG.count(WRITE) == 1
    assert len(OTHERS) == 2
    assert "3 passed" in run(tmp_path, MENDED, *OTHERS)
