# SPDX-License-Identifier: Apache-2.0
"""Where things lie in the repository, wherever a test stands."""

from pathlib import Path
from typing import Final

__all__ = ["FIXTURES", "ROOT"]

ROOT: Final = Path(__file__).parents[2]
FIXTURES: Final = ROOT / "tests" / "metadata" / "fixtures"  # metadata of every version
