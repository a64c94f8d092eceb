# SPDX-License-Identifier: Apache-2.0
"""scripts/bench_qcow2.py: both kinds of images become equal disks on both sides, and each figure is there."""

import json
from pathlib import Path

import pytest

from scripts.bench_qcow2 import KINDS, main
from tests.support.clients import needs

pytestmark = [pytest.mark.long, needs("qemu-img", "qemu-nbd")]


def test_every_figure_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--size", "2", "--repeat", "1", "--dir", str(tmp_path)]) == 0
    figures = json.loads(capsys.readouterr().out)
    for kind in KINDS:
        seconds = [
            figures[f"{kind}_{side}_s"] for side in ("clone", "convert", "durable")
        ]
        assert min(seconds) > 0
        assert figures[f"{kind}_times_durable"] > 0
    assert list(tmp_path.iterdir()) == []
