# SPDX-License-Identifier: Apache-2.0
"""The table that `status` prints on a terminal."""

import copy
import io
import re

import pytest
from rich.console import Console

from nbdtarget.cli.status_table import bar, draw, duration
from nbdtarget.control.fields import BelowLine
from nbdtarget.control.figures import (
    DeviceFigures,
    FiguresAnswer,
    OperationFigures,
    TargetFigures,
)
from tests.support.figures import figures

MIB = 1 << 20
Fields = dict[str, bool | int | float | str | None]


def device(name: str, *targets: TargetFigures) -> DeviceFigures:
    return DeviceFigures(
        name=name,
        uuid="",
        size=256 * MIB,
        suspended=False,
        failed=False,
        failure="",
        event_nr=0,
        connections=1,
        in_flight=0,
        operations={"read": OperationFigures(1000, 4096_000, 1.0)},
        targets=targets,
        deps=("/srv/a.img",),
        below=(BelowLine("/srv/a.img"),),
        losses=0,
    )


def clone(hydrated: int) -> TargetFigures:
    fields: Fields = {
        "regions_hydrated": hydrated,
        "region_size_bytes": 65536,
        "hydration": True,
        "mode": "rw",
    }
    return TargetFigures(0, 524288, "clone", fields)


def cache() -> TargetFigures:
    fields: Fields = {
        "cache_blocks_total": 1000,
        "cache_blocks_used": 500,
        "block_size_bytes": 65536,
        "hit_ratio": 0.934,
        "dirty_bytes": 3 * MIB,
        "mode": "rw",
    }
    return TargetFigures(0, 524288, "cache", fields)


def drawn(before: FiguresAnswer | None, now: FiguresAnswer) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=140, color_system=None).print(draw(before, now))
    return [" ".join(line.split()) for line in out.getvalue().splitlines()]


def test_rates_and_the_time_that_is_left() -> None:
    before = figures(100.0, device("web", clone(1024)))
    after = device("web", clone(1344))
    after.operations = {"read": OperationFigures(3000, 12_288_000, 1.5)}
    head, line, more = drawn(before, figures(102.0, after))
    assert head == "DEVICE SIZE STATE WHAT READ WRITE CLIENTS"
    assert line == (
        "web 256.0 MiB active clone [###.......] 33% of 256.0 MiB, 10.0 MiB/s, 17 s left"
        " 1,000/s 3.9 MiB/s - 1"
    )
    assert more == "0.25 ms"


def test_a_clone_that_is_complete_and_a_cache() -> None:
    lines = drawn(None, figures(1.0, device("c", clone(4096)), device("k", cache())))
    assert "clone, complete" in lines[1]
    assert (
        "cache [#####.....] 50% of 62.5 MiB used, 93% hits, 3.0 MiB dirty" in lines[2]
    )


def test_what_is_wrong_stands_below() -> None:
    ill = device("web", cache())
    ill.below = (BelowLine("/srv/a.img", "latched", last_error="flush: I/O error"),)
    ill.losses = 2
    ill.targets[0].fields.update({"mode": "ro", "needs_check": True})
    lines = drawn(None, figures(1.0, ill))
    assert "disk away" in lines[1]
    assert lines[2:] == [
        "web: /srv/a.img is latched: flush: I/O error",
        "web: writes that were not flushed may have been lost (2 times)",
        "web: nothing is recorded any more (mode ro): see the log of the server",
        "web: its metadata must be checked: nbdtarget metadata check",
    ]


def test_states_of_devices() -> None:
    failed = device("f")
    failed.failed, failed.failure = True, "no such disk"
    suspended = copy.copy(device("s", TargetFigures(0, 8, "linear", {})))
    suspended.suspended = True
    off = device("p", TargetFigures(0, 8, "powercut", {"power_is_on": False}))
    parts = device("n", *[TargetFigures(at, 8, "linear", {}) for at in (0, 8)])
    lines = drawn(None, figures(1.0, failed, suspended, off, parts))
    assert re.search("f .* failed no such disk", lines[1])
    assert re.search("s .* suspended linear /srv/a.img", lines[2])
    assert re.search("the power is off", lines[3])
    assert re.search("2 x linear", lines[4])


def test_no_devices() -> None:
    assert drawn(None, figures(1.0)) == ["No devices found"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (61, "1 min 1 s"), (7322, "2 h 2 min"), (200_000, "2 d 7 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_bars() -> None:
    assert [bar(0), bar(0.5), bar(1)] == [
        "[..........]",
        "[#####.....]",
        "[##########]",
    ]
