# SPDX-License-Identifier: Apache-2.0
"""`make attack-stalled` with a few clients and short times: all that stall are closed, and the quiet client is served."""

import json
from pathlib import Path

import pytest

from scripts import attack_stalled
from tests.support.certificates import needs_openssl


@needs_openssl
@pytest.mark.long
@pytest.mark.parametrize(
    "more", [[], ["--direct", "--greedy"]], ids=["modest", "greedy"]
)
def test_clients_that_stall_are_closed_while_a_quiet_one_is_served(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(attack_stalled, "TIMES", dict.fromkeys(attack_stalled.TIMES, 1))
    monkeypatch.setattr(attack_stalled, "PHASE_QUICK_S", 0.8)
    monkeypatch.setattr(attack_stalled, "SETTLE_S", 0.3)
    monkeypatch.setattr(attack_stalled, "SPARE_S", 0.3)
    figures = tmp_path / "figures"
    arguments = ["--quick", "--each", "6", "--json", str(figures), *more]
    assert attack_stalled.main(arguments) == 0
    found = json.loads(figures.read_text())
    assert [row["phase"] for row in found["phases"]] == [
        *["quiet", "arriving", "stalled", "ending", "ended", "later"]
    ]
    assert all(row["reads"] > 0 for row in found["phases"])
    assert {kind: left for kind, (left, _) in found["closed"].items()} == dict.fromkeys(
        attack_stalled.KINDS, 0
    )
    assert found["held"] == 0


def test_p99_is_in_microseconds() -> None:
    assert attack_stalled.p99_us([nr / 1000 for nr in range(100)]) == pytest.approx(
        99_000
    )
