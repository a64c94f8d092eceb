# SPDX-License-Identifier: Apache-2.0
"""Programs of Prometheus that tests run: those that are installed, or those that `scripts/unpack-prometheus` has unpacked."""

import shutil
from typing import Final

import pytest

from tests.support.places import ROOT

__all__ = ["PROMETHEUS", "PROMTOOL", "needs_prometheus", "needs_promtool"]

_UNPACKED: Final = str(ROOT / "build" / "prometheus" / "bin")


def _maybe(program: str) -> str | None:
    return shutil.which(program) or shutil.which(program, path=_UNPACKED)


PROMETHEUS: Final = _maybe("prometheus")
PROMTOOL: Final = _maybe("promtool")
needs_prometheus = pytest.mark.skipif(
    PROMETHEUS is None, reason="not installed: prometheus"
)
needs_promtool = pytest.mark.skipif(PROMTOOL is None, reason="not installed: promtool")
