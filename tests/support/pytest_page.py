# SPDX-License-Identifier: Apache-2.0
"""The code on the page on pytest: a test that finds a bug, and the same when the bug is mended."""

import re
from typing import Final

from tests.support.places import ROOT

__all__ = ["BUG", "MENDED", "OTHERS", "PRINTED", "WRITE"]

_PAGE: Final = (ROOT / "docs/how-to/pytest.md").read_text()
_CODE: Final = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_PRINTED: Final = re.compile(r"^```text\n(.*?)^```$", re.MULTILINE | re.DOTALL)

BUG, *OTHERS = _CODE.findall(_PAGE)
(PRINTED,) = _PRINTED.findall(_PAGE)  # of BUG
WRITE: Final = "        file.write(record)\n"
_SYNC: Final = "        file.flush()\n        os.fsync(file.fileno())\n"
MENDED: Final = "import os\n\n\n" + BUG.replace(WRITE, WRITE + _SYNC)
