# SPDX-License-Identifier: Apache-2.0
"""A killed server keeps its word. A short run of what `make kill-test` does for longer."""

import random
from pathlib import Path

import pytest

from scripts.kill_loop import KINDS

pytestmark = [pytest.mark.interop, pytest.mark.long]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_flushed_writes_survive_sigkill_under_load(tmp_path: Path, kind: str) -> None:
    fire = KINDS[kind](tmp_path, random.Random(11), size=4 << 20)
    try:
        for life_s, clean in ((0.05, False), (0.2, False), (0.2, True), (0.1, False)):
            fire.fire(life_s, clean=clean)
        fire.finish()
    finally:
        fire.close()
