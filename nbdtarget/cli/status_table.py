# SPDX-License-Identifier: Apache-2.0
"""The output of `status` on a terminal: a line for each device, with sizes, rates and how far it is; below it, what is wrong.

Rates are differences between two moments, WINDOW_S apart. `nbdtarget top` draws the same.
"""

from collections.abc import Iterator, Sequence
from typing import Final

from rich.console import Console, Group, RenderableType
from rich.table import Column, Table
from rich.text import Text

from nbdtarget.common.units import describe_bytes
from nbdtarget.control.figures import DeviceFigures, FiguresAnswer, TargetFigures
from nbdtarget.monitor.rates import (
    Rate,
    devices_of,
    field,
    progress_of,
    rates_of,
)

__all__ = ["WINDOW_S", "draw", "print_status"]

WINDOW_S: Final = 1.0
BAR_WIDTH: Final = 10
_NOTHING: Final = Rate(0, 0, None)


def print_status(before: FiguresAnswer, now: FiguresAnswer) -> None:
    """Print the table on stdout."""
    Console().print(draw(before, now))


def draw(before: FiguresAnswer | None, now: FiguresAnswer) -> RenderableType:
    """Return the table, and a line for each thing that is wrong."""
    if not now.devices:
        return Text("No devices found")
    seconds = now.time_s - before.time_s if before is not None else 0.0
    earlier = devices_of(before)
    table = Table(
        Column("DEVICE", overflow="fold"),
        Column("SIZE", justify="right", no_wrap=True),
        Column("STATE", no_wrap=True),
        Column("WHAT", overflow="fold", ratio=1),
        Column("READ", justify="right", no_wrap=True),
        Column("WRITE", justify="right", no_wrap=True),
        Column("CLIENTS", justify="right", no_wrap=True),
        box=None,
        pad_edge=False,
        header_style="bold",
        expand=True,
    )
    for device in now.devices:
        then = earlier.get(device.name)
        rates = rates_of(device, then, seconds)
        table.add_row(
            Text(device.name, style="bold"),
            describe_bytes(device.size),
            _state(device),
            Text("\n").join(_what(device, then, seconds)),
            _rate(rates.get("read", _NOTHING)),
            _rate(rates.get("write", _NOTHING)),
            str(device.connections),
        )
    wrong = [Text(line, style="red") for line in _wrong(now)]
    return Group(table, *wrong)


def _state(device: DeviceFigures) -> Text:
    if device.failed:
        return Text("failed", style="bold red")
    if device.suspended:
        return Text("suspended", style="yellow")
    if any(disk.state != "ok" for disk in device.below):
        return Text("disk away", style="bold red")
    return Text("active", style="green")


def _rate(rate: Rate) -> str:
    """For example "1,200/s 4.7 MiB/s 0.05 ms"."""
    if not rate.per_s:
        return "-"
    mean = "" if rate.mean_s is None else f"\n{rate.mean_s * 1000:.2f} ms"
    return f"{rate.per_s:,.0f}/s {describe_bytes(int(rate.bytes_per_s))}/s{mean}"


def _what(
    device: DeviceFigures, before: DeviceFigures | None, seconds: float
) -> Iterator[Text]:
    earlier: Sequence[TargetFigures] = () if before is None else before.targets
    by_start = {each.start: each for each in earlier}
    if not device.targets:
        yield Text(device.failure or "no table")
    if len(device.targets) > 1 and len({each.type for each in device.targets}) == 1:
        yield Text(f"{len(device.targets)} x {device.targets[0].type}")
        return
    for target in device.targets:
        yield _target(device, target, by_start.get(target.start), seconds)


def _target(
    device: DeviceFigures,
    target: TargetFigures,
    before: TargetFigures | None,
    seconds: float,
) -> Text:
    progress = progress_of(target, before, seconds)
    if progress is not None:
        if progress.done == progress.total:
            return Text("clone, complete")
        share = progress.done / progress.total
        words = f"clone {bar(share)} {share:.0%} of {describe_bytes(progress.total)}"
        if progress.bytes_per_s:
            words += f", {describe_bytes(int(progress.bytes_per_s))}/s"
        if progress.left_s is not None:
            words += f", {duration(progress.left_s)} left"
        elif not target.fields.get("hydration"):
            words += ", does not copy by itself"
        return Text(words)
    if target.type == "cache":
        return Text(_cache(target))
    if target.type == "powercut" and not target.fields.get("power_is_on"):
        return Text("powercut, the power is off", style="red")
    return Text(f"{target.type} {' '.join(device.deps)}".strip())


def _cache(target: TargetFigures) -> str:
    size = field(target, "cache_blocks_total") * field(target, "block_size_bytes")
    used = field(target, "cache_blocks_used") * field(target, "block_size_bytes")
    share = used / size if size else 0.0
    words = f"cache {bar(share)} {share:.0%} of {describe_bytes(size)} used"
    hits = target.fields.get("hit_ratio")
    if isinstance(hits, float):
        words += f", {hits:.0%} hits"
    dirty = field(target, "dirty_bytes")
    return words + (f", {describe_bytes(dirty)} dirty" if dirty else ", clean")


def bar(share: float) -> str:
    """Return a bar of characters that every terminal has."""
    filled = round(share * BAR_WIDTH)
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}]"


def duration(seconds: float) -> str:
    """Return a time for people, in its two largest units."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def _wrong(figures: FiguresAnswer) -> Iterator[str]:
    for device in figures.devices:
        for disk in device.below:
            if disk.state != "ok":
                yield f"{device.name}: {disk.name} is {disk.state}: {disk.last_error}"
        if device.losses:
            yield f"{device.name}: writes that were not flushed may have been lost ({device.losses} times)"
        for target in device.targets:
            mode = target.fields.get("mode")
            if mode not in (None, "rw"):
                error = target.fields.get("last_error") or "see the log of the server"
                yield f"{device.name}: nothing is recorded any more (mode {mode}): {error}"
            if target.fields.get("needs_check"):
                yield f"{device.name}: its metadata must be checked: nbdtarget metadata check"
