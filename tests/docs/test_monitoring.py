# SPDX-License-Identifier: Apache-2.0
"""Alerts and dashboard for Prometheus and Grafana: Prometheus itself runs them, and they name no metric that the server has not."""

import json
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from nbdtarget.monitor.families import FAMILIES
from tests.support.monitoring import PROMTOOL, needs_promtool
from tests.support.places import ROOT

ALERTS = ROOT / "contrib/prometheus/nbdtarget.rules.yml"
TESTS = ROOT / "contrib/prometheus/nbdtarget.test.yml"
DASHBOARD = ROOT / "contrib/grafana/nbdtarget.json"


def promtool(*words: str) -> None:
    assert PROMTOOL is not None
    done = subprocess.run(
        [PROMTOOL, *words],
        cwd=TESTS.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def expressions() -> list[str]:
    """Return the expressions of all panels and variables."""
    board = json.loads(DASHBOARD.read_text())
    panels: list[dict[str, Any]] = [p for p in board["panels"] if p["type"] != "row"]
    assert len(panels) > 15
    found = [target["expr"] for panel in panels for target in panel["targets"]]
    return found


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\bnbdtarget_\w+", text))


def metrics() -> set[str]:
    names = {family.name for family in FAMILIES}
    histograms = [family.name for family in FAMILIES if family.kind == "histogram"]
    return names | {
        f"{name}_{suffix}"
        for name in histograms
        for suffix in ("bucket", "sum", "count")
    }


@pytest.mark.parametrize("path", [ALERTS, TESTS, DASHBOARD], ids=lambda path: path.name)
def test_every_metric_that_is_named_exists(path: Path) -> None:
    names = names_in(path.read_text())
    assert len(names) > 8
    assert names - metrics() == set()


@needs_promtool
def test_alerts_fire_when_they_should() -> None:
    promtool("test", "rules", TESTS.name)


def test_each_alert_has_a_test() -> None:
    (group,) = yaml.safe_load(ALERTS.read_text())["groups"]
    tests = yaml.safe_load(TESTS.read_text())["tests"]
    fired = {
        rule["alertname"]
        for test in tests
        for rule in test["alert_rule_test"]
        if rule["exp_alerts"]
    }
    assert {rule["alert"] for rule in group["rules"]} == fired


@needs_promtool
def test_prometheus_understands_each_panel(tmp_path: Path) -> None:
    rules = [
        {"record": f"panel:{nr}", "expr": re.sub(r"\$__rate_interval", "1m", each)}
        for nr, each in enumerate(expressions())
    ]
    path = tmp_path / "panels.yml"
    path.write_text(json.dumps({"groups": [{"name": "panels", "rules": rules}]}))
    promtool("check", "rules", str(path))


def test_panels_do_not_overlap() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in json.loads(DASHBOARD.read_text())["panels"]:
        place = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert max(x for x, _ in cells) < 24
        assert not cells & taken, panel["title"]
        taken |= cells


# These names are from Grafana's list: https://grafana.com/docs/grafana/latest/panels-visualizations/configure-standard-options/
UNITS = {"Bps", "bytes", "iops", "none", "percentunit", "s"}
# Variables that Grafana has by itself.
BUILT_IN = {"__rate_interval", "__all"}


def test_each_panel_of_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text())
    assert board.get("id") is None, "Grafana gives a board its number"
    assert 0 < len(board["uid"]) <= 40
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    source = {"type": "prometheus", "uid": "${datasource}"}
    for panel in board["panels"]:
        if panel["type"] == "row":
            assert panel["panels"] == []
            continue
        assert panel["title"]
        assert panel["description"].endswith(".")
        assert panel["datasource"] == source
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]
        names = [target["refId"] for target in panel["targets"]]
        assert len(set(names)) == len(names) > 0
        assert all(target["datasource"] == source for target in panel["targets"])


def test_each_variable_of_the_dashboard_is_defined_and_used() -> None:
    text = DASHBOARD.read_text()
    used = set(re.findall(r"\$\{?(\w+)", text)) - BUILT_IN
    defined = [each["name"] for each in json.loads(text)["templating"]["list"]]
    assert sorted(used) == sorted(defined)
