# SPDX-License-Identifier: Apache-2.0
"""What tests of the command line share."""

from pathlib import Path

import pytest

from tests.nbdtarget.cli.metadata_tool import Tool


@pytest.fixture
def tool(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Tool:
    return Tool(capsys, tmp_path)
