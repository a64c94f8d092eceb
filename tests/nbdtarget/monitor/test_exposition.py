# SPDX-License-Identifier: Apache-2.0
"""The text for Prometheus: promtool and prometheus-client read it, and the latter would have written the same."""

import asyncio
import re
import subprocess

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from nbdtarget.control.figures import FiguresAnswer
from nbdtarget.monitor.exposition import FigureCollector, exposition
from tests.support.monitoring import PROMTOOL, needs_promtool
from tests.support.served import AWKWARD, Served

Sample = tuple[str, frozenset[tuple[str, str]], float]


def samples(text: str) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    found: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found, f"{key} comes twice"
            found[key] = sample.value
    return found


def of(text: str, name: str, **labels: str) -> float:
    return samples(text)[name, frozenset(labels.items())]


async def test_numbers_are_those_of_the_clients(served: Served) -> None:
    text = await served.metrics()
    assert of(text, "nbdtarget_disk_reads_completed_total", device="c") == 1
    assert of(text, "nbdtarget_disk_written_bytes_total", device="c") == 65536
    assert of(text, "nbdtarget_device_failed", device="failed") == 1
    assert of(text, "nbdtarget_device_size_bytes", device=AWKWARD) == 8192
    assert of(text, "nbdtarget_connections") == 1
    name = "nbdtarget_request_duration_seconds"
    assert of(text, f"{name}_count", operation="write") == 1
    assert of(text, f"{name}_bucket", operation="write", le="+Inf") == 1
    assert of(text, "nbdtarget_lower_disk_up", device=AWKWARD, disk="memory:4096") == 1
    assert "process_cpu_seconds_total" in text
    assert "_created" not in text


def written_by_library(figures: FiguresAnswer) -> list[str]:
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FigureCollector(lambda: figures))
    return generate_latest(registry).decode().splitlines()


LINE = re.compile(r"(?P<name>\w+)(?:\{(?P<labels>.*)\})? (?P<number>\S+)")
LABEL = re.compile(r'\w+="(?:[^"\\]|\\.)*"(?:,|$)')


def taken_apart(line: str) -> str | tuple[str, list[str], float]:
    """Two things may be written in two ways: the order of labels, and numbers, 4096 or 4096.0."""
    if line.startswith("#"):
        return line
    found = LINE.fullmatch(line)
    assert found is not None, line
    labels = LABEL.findall(found["labels"] or "")
    assert "".join(labels) == (found["labels"] or "")
    ordered = sorted(label.removesuffix(",") for label in labels)
    return found["name"], ordered, float(found["number"])


async def test_the_library_would_write_the_same(served: Served) -> None:
    figures = await served.figures()
    theirs = written_by_library(figures)
    ours = (await exposition(figures)).decode().splitlines()
    mine, process = ours[: len(theirs)], ours[len(theirs) :]
    assert [*map(taken_apart, mine)] == [*map(taken_apart, theirs)]
    assert all("process_" in line for line in process)


async def test_many_devices_are_written_in_parts(
    served: Served, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = await served.figures()
    at_once = await exposition(whole)
    monkeypatch.setattr("nbdtarget.monitor.exposition.LINES_AT_ONCE", 2)
    in_parts = await exposition(whole)
    nr = len(written_by_library(whole))
    assert in_parts.splitlines()[:nr] == at_once.splitlines()[:nr]


async def test_without_lines_of_single_devices(served: Served) -> None:
    assert served.observer is not None
    served.observer.has_device_metrics = False
    text = await served.metrics()
    assert 'device="' not in text
    assert of(text, "nbdtarget_devices") == 4
    assert of(text, "nbdtarget_request_bytes_total", operation="write") == 65536


@needs_promtool
async def test_promtool_finds_nothing_to_complain_of(served: Served) -> None:
    assert PROMTOOL is not None
    text = await served.metrics()
    done = await asyncio.to_thread(
        subprocess.run,
        [PROMTOOL, "check", "metrics"],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
