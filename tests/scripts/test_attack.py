# SPDX-License-Identifier: Apache-2.0
"""`make attack` in its short form: what hostile clients do is over when they have gone."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.attack import ATTACKS, line_of

pytestmark = pytest.mark.long

MEMORY_MIB_MAX = 300


def test_attacks_cost_a_quiet_client_little_and_leave_nothing_behind(
    tmp_path: Path,
) -> None:
    figures = tmp_path / "figures"
    command = [
        sys.executable,
        "-m",
        "scripts.attack",
        "--quick",
        "--json",
        str(figures),
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(figures.read_text())
    assert len(rows) == len(ATTACKS)
    for row in rows:
        assert row["held"] <= 0, row
        assert row["resident_mib"] < MEMORY_MIB_MAX, row
        # A busy machine is slow by itself; an attack that works takes many seconds.
        assert row["longest_ms"] < 60_000, row


def test_a_table_is_compared_with_an_earlier_one() -> None:
    row = {
        "attack": "burst",
        "p50_ms": 1.0,
        "p99_ms": 2.0,
        "longest_ms": 3.0,
        "attach_ms": 4.0,
        "resident_mib": 50,
        "held": 0,
    }
    before = {**row, "longest_ms": 501.0, "held": 1}
    assert line_of(row, None).split() == [
        *["burst", "1.0", "ms", "2.0", "ms", "3", "ms", "4", "ms", "50", "0"]
    ]
    assert line_of(row, before).endswith("before: 1.0, 2.0, 501, 4 ms, 50 MiB, 1 held")
