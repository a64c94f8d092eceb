# SPDX-License-Identifier: Apache-2.0
"""The documentation builds without a warning, where Sphinx is installed (`make docs` installs it)."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MISSING = [
    name
    for name in ("sphinx", "myst_parser", "furo")
    if importlib.util.find_spec(name) is None
]


@pytest.mark.slow
@pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)}")
def test_man_pages_are_built_without_a_warning(tmp_path: Path) -> None:
    options = ["--quiet", "--fail-on-warning", "--builder", "man"]
    folders = ["--doctree-dir", str(tmp_path / "doctrees"), "docs", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "sphinx", *options, *folders],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "nbdtarget-clone.1").read_text()
    assert "--hydrate\\-on\\-read" in page or "\\-\\-hydrate\\-on\\-read" in page
