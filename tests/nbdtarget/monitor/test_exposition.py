# SPDX-License-Identifier: Apache-2.0
"""The text for Prometheus: promtool and prometheus-client read it, and the latter would have written the same."""

import asyncio
import subprocess

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

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


async def test_the_library_would_write_the_same(served: Served) -> None:
    figures = await served.figures()
    registry = CollectorRegistry(auto_describe=False)
    registry.register(FigureCollector(lambda: figures))
    ours = (await exposition(figures)).decode()
    theirs = generate_latest(registry).decode()
    assert samples(ours).items() >= samples(theirs).items()
    heads = [line for line in theirs.splitlines() if line.startswith("#")]
    assert [line for line in ours.splitlines() if line.startswith("#")][
        : len(heads)
    ] == heads


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
