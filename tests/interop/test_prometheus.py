# SPDX-License-Identifier: Apache-2.0
"""A real Prometheus scrapes a real server: it takes our rules, and each panel of the dashboard has something to show."""

import json
import os
import re
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget_protocol.consts import CMD_TRIM
from tests.support.monitoring import PROMETHEUS, needs_prometheus
from tests.support.patience import PATIENCE_S
from tests.support.places import ROOT
from tests.support.plain_client import PlainClient, PlainClientError
from tests.support.processes import NBDTARGET, ServerProcess, maybe_port

pytestmark = [
    pytest.mark.long,
    pytest.mark.interop,
    needs_prometheus,
]
RULES: Final = ROOT / "contrib/prometheus/nbdtarget.rules.yml"
DASHBOARD: Final = ROOT / "contrib/grafana/nbdtarget.json"
MIB: Final = 1 << 20
SIZE: Final = 8 * MIB


def until(condition: Callable[[], Any], what: str) -> Any:
    """Return what `condition` returns as soon as that is true."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.2)
    return found


class Site:
    """A server with something of everything, whose source is another server."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.nbd, self.control = folder / "nbd", folder / "control"
        (folder / "source.img").write_bytes(os.urandom(SIZE))
        self.source = ServerProcess(
            [
                *(NBDTARGET, "export", str(folder / "source.img"), "--name", "source"),
                *("--listen", f"unix:{folder}/source", "--control", f"{folder}/c2"),
            ],
            sockets=[folder / "source"],
            log=folder / "source.log",
        )
        self.server = ServerProcess(
            [
                *(NBDTARGET, "serve", "--verbose", "--listen", f"unix:{self.nbd}"),
                *("--control", str(self.control), "--metrics", "tcp:127.0.0.1:0"),
            ],
            sockets=[self.nbd, self.control],
            log=folder / "log",
        )
        self.address = until(self._metrics, "the server does not say its port")
        self.client = ControlClient(self.control)
        for name in ("clone.img", "origin.img", "cache.img"):
            (folder / name).write_bytes(bytes(SIZE))
        sectors = SIZE // 512
        uri = f"nbd+unix:///source?socket={folder}/source"
        self.create(
            "clone",
            f"0 {sectors} clone {folder}/clone.meta {folder}/clone.img {uri} 128 0 2 hydration_rate 65536",
        )
        disks = f"{folder}/cache.meta {folder}/cache.img {folder}/origin.img"
        self.create("cache", f"0 {sectors} cache {disks} 128 1 writeback smq 0")
        self.create("ill", f"0 {sectors} error")
        self.create("still", "0 8 zero")
        self.client.ask("suspend", m.Suspend("still"), m.Done)

    def _metrics(self) -> str | None:
        said = self.server.log.read_text()
        found = re.search(r"metrics: tcp:(127\.0\.0\.1:\d+)\n", said)
        return None if found is None else found[1]

    def create(self, name: str, table: str) -> None:
        self.client.ask("create", m.Create(name, table), m.Done)

    def use(self) -> None:
        """Send a few requests of each kind."""
        for name in ("clone", "cache"):
            with PlainClient(self.nbd, name) as client:
                for _ in range(4):
                    client.write(0, os.urandom(65536))
                    client.read(0, 65536)
                    client.read(4 * MIB, 4096)
                client.flush()
                client.send(CMD_TRIM, MIB, 65536)
                assert client.receive()[1] == 0
        with PlainClient(self.nbd, "ill") as client, pytest.raises(PlainClientError):
            client.read(0, 512)
        words = m.Message("cache", 0, ("clean_now",))
        self.client.ask("message", words, m.MessageAnswer)

    def close(self) -> None:
        self.client.ask("resume", m.Resume("still"), m.Done)
        assert self.server.terminate() == 0
        assert self.source.terminate() == 0


class Prometheus:
    """One that scrapes `address` each second, with our rules; on a port of its own choice."""

    def __init__(self, folder: Path, address: str) -> None:
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(RULES)],
            "scrape_configs": [
                {
                    "job_name": "nbdtarget",
                    "static_configs": [{"targets": [address]}],
                }
            ],
        }
        (folder / "prometheus.yml").write_text(json.dumps(config))
        assert PROMETHEUS is not None
        self.log = folder / "prometheus.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [
                    PROMETHEUS,
                    f"--config.file={folder}/prometheus.yml",
                    f"--storage.tsdb.path={folder}/tsdb",
                    "--web.listen-address=127.0.0.1:0",
                ],
                stdout=log,
                stderr=log,
            )
        self.port = until(self._port, "it does not listen")

    def _port(self) -> int | None:
        assert self.process.poll() is None, self.log.read_text()
        return maybe_port(self.process.pid)

    def ask(self, url: str) -> Any:
        with urllib.request.urlopen(
            f"http://127.0.0.1:{self.port}{url}", timeout=PATIENCE_S
        ) as it:
            answer = json.load(it)
        assert answer["status"] == "success"
        return answer["data"]

    def query(self, expression: str) -> list[Any]:
        asked = urllib.parse.urlencode({"query": expression})
        found: list[Any] = self.ask(f"/api/v1/query?{asked}")["result"]
        return found

    def is_ready(self) -> bool:
        try:
            return bool(self.query('up{job="nbdtarget"} == 1'))
        except (OSError, AssertionError):
            return False  # it is starting

    def close(self) -> None:
        self.process.terminate()
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    made = Site(tmp_path)
    yield made
    made.close()


@pytest.fixture
def prometheus(site: Site, tmp_path: Path) -> Iterator[Prometheus]:
    made = Prometheus(tmp_path, site.address)
    yield made
    made.close()


def panels() -> list[tuple[str, str]]:
    """Title and expression of each target, as a Grafana would ask that has just been opened."""
    board = json.loads(DASHBOARD.read_text())
    found = []
    for panel in board["panels"]:
        for target in panel.get("targets", ()):
            expression = target["expr"].replace("$__rate_interval", "1m")
            for name in ("instance", "device"):
                expression = expression.replace(f"${name}", ".*")
            found.append((panel["title"], expression))
    assert len(found) > 25
    return found


def test_rules_are_taken_and_each_panel_shows_something(
    site: Site, prometheus: Prometheus
) -> None:
    until(prometheus.is_ready, "it does not scrape")

    def missing() -> list[tuple[str, str]]:
        site.use()
        return [each for each in panels() if not prometheus.query(each[1])]

    left: list[tuple[str, str]] = []

    def are_shown() -> bool:
        left[:] = missing()
        return not left

    until(are_shown, f"these show nothing: {left}")
    groups = prometheus.ask("/api/v1/rules")["groups"]
    rules = {rule["name"]: rule for group in groups for rule in group["rules"]}
    assert len(rules) == RULES.read_text().count("- alert: ")
    until(
        lambda: all(
            rule["health"] == "ok"
            for group in prometheus.ask("/api/v1/rules")["groups"]
            for rule in group["rules"]
        ),
        "a rule has failed",
    )

    def pending() -> bool:
        alerts = prometheus.ask("/api/v1/alerts")["alerts"]
        names = {
            (each["labels"]["alertname"], each["labels"].get("device"))
            for each in alerts
        }
        return ("NbdtargetSuspendedTooLong", "still") in names

    until(pending, "the device that is suspended raises no alert")
    # The dashboard fills its variables from this query.
    devices = {
        row["metric"]["device"] for row in prometheus.query("nbdtarget_device_info")
    }
    assert devices == {"clone", "cache", "ill", "still"}
