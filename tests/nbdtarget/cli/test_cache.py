# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget cache` and `uncache`: what options mean, and what is printed."""

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from io import StringIO
from typing import Any

import pytest

from nbdtarget.cli.app import run
from nbdtarget.cli.progress import cache as progress_cache
from nbdtarget.cli.progress import uncache as progress_uncache
from nbdtarget.cli.progress.cache import describe_status
from nbdtarget.common.units import describe_bytes
from nbdtarget.control.uncache import CacheLine, Draining
from nbdtarget.porcelain.cache import CacheOptions, CachePlan, CacheStatus
from nbdtarget.targets.cache.table import Options

PLAN = CachePlan(
    name="disk",
    size=1 << 30,
    table="0 2097152 cache m c o …",
    origin="/slow",
    metadata="/meta",
    missing=None,
    was_clean=True,
)
OPTIONS = CacheOptions(origin="slow", cache="fast")
URIS = ["nbd+unix:///{name}?socket=/run/s"]
STATUS = CacheStatus(
    used_blocks=512,
    total_blocks=1024,
    dirty_blocks=3,
    dirty_bytes=3 << 16,
    hit_ratio=0.931,
    promotions=600,
    demotions=88,
)
LINE = CacheLine(
    length=2097152,
    metadata="/meta",
    cache="/fast",
    origin="/slow disk",
    block_sectors=128,
    options=Options(),
    read_only=False,
)
DRAINING = Draining(dirty_blocks=3, dirty_bytes=3 << 16, errors=0, last_error=None)
STUCK = Draining(
    dirty_blocks=3, dirty_bytes=3 << 16, errors=7, last_error="writeback: /slow: full"
)


class Terminal(StringIO):
    def isatty(self) -> bool:
        return True


# ---- options ----


@pytest.mark.parametrize(
    ("option", "value", "reason"),
    [
        ("--block-size", "48K", "it must be a multiple of 32K up to 1G"),
        ("--block-size", "2G", "it must be a multiple of 32K up to 1G"),
        ("--block-size", "0", "must be more than 0"),
        ("--block-size", "much", "not a size"),
        ("--cache-size", "0", "must be more than 0"),
        ("--migration-rate", "0", "must be more than 0"),
        ("--migration-rate", "fast", "not a size"),
        ("--migration-threshold", "x", "not a size"),
        ("--mode", "writearound", "writearound"),
    ],
)
def test_option_that_makes_no_sense(
    capsys: pytest.CaptureFixture[str], option: str, value: str, reason: str
) -> None:
    assert run(["cache", "slow", "fast", option, value]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert option in err
    assert reason in err


def test_options_arrive_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[CacheOptions] = []

    class Job:
        def __init__(self, options: CacheOptions, reporter: object) -> None:
            given.append(options)

        async def run(self) -> int:
            return 7

    monkeypatch.setattr("nbdtarget.porcelain.cache.CacheJob", Job)
    words = "--block-size 96K --cache-size 10G --mode writeback --no-dirty-log"
    words += " --migration-rate 50M --migration-threshold 1M --policy mq --resize"
    assert run(["cache", "slow", "fast", *words.split()]) == 7
    assert given == [
        CacheOptions(
            origin="slow",
            cache="fast",
            block_size=96 << 10,
            cache_size=10 << 30,
            mode="writeback",
            dirty_log=False,
            migration_rate=50 << 20,
            migration_threshold=1 << 20,
            policy="mq",
            resize=True,
        )
    ]


# ---- cache ----


def test_sizes_as_a_person_says_them() -> None:
    sizes = (0, 1023, 1024, 3 << 16, 5 << 29, 3 << 40, 3 << 52)
    assert [describe_bytes(size) for size in sizes] == [
        *("0 B", "1023 B", "1.0 KiB", "192.0 KiB", "2.5 GiB", "3.0 TiB", "12288.0 TiB")
    ]


def test_status_in_a_line() -> None:
    assert describe_status(STATUS) == (
        "used 512/1024 blocks (50 %), dirty 3 (192.0 KiB), hits 93.1 %, promotions 600"
    )


@contextmanager
def reporting(*, is_json: bool = False) -> Iterator[Any]:
    with progress_cache.cache_reporter(OPTIONS, json=is_json) as reporter:
        yield reporter


def test_lines_of_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting() as reporter:
        reporter.serving(PLAN, URIS)
        reporter.unclean(3, 3 << 16)
        reporter.unclean(0, 0)
        reporter.status(STATUS)
        reporter.status(STATUS)
        reporter.uncached()
        reporter.failed("8 … ro needs_check")
        reporter.stopping()
        reporter.stopped(0, 0)
        reporter.stopped(3, 3 << 16)
        reporter.not_clean("/meta: lost")
    out, err = capsys.readouterr()
    assert out.startswith("slow is cached by fast (writethrough): attach to\n")
    assert "  nbd+unix:///disk?socket=/run/s\n" in out
    assert err.splitlines() == [
        "nbdtarget: the cache was not shut down cleanly: 3 blocks (192.0 KiB) count as"
        " dirty and are written back",
        "nbdtarget: the cache was not shut down cleanly: 0 blocks (0 B) count as dirty",
        f"nbdtarget: {describe_status(STATUS)}",
        "nbdtarget: uncached: slow alone is the disk; still serving (Ctrl-C ends)",
        "nbdtarget: the cache cannot record anything any more: 8 … ro needs_check",
        "nbdtarget: stopped: 3 blocks (192.0 KiB) of slow are in fast only; run the"
        " same command again to continue",
        "nbdtarget: /meta: lost; do not use slow without its cache",
    ]


def test_json_of_a_cache(capsys: pytest.CaptureFixture[str]) -> None:
    with reporting(is_json=True) as reporter:
        reporter.serving(PLAN, URIS)
        reporter.unclean(3, 3 << 16)
        reporter.status(STATUS)
        reporter.status(STATUS)
        reporter.uncached()
        reporter.failed("8 … ro needs_check")
        reporter.stopping()
        reporter.stopped(0, 0)
        reporter.not_clean("/meta: lost")
    out, err = capsys.readouterr()
    assert err == ""
    events = [json.loads(line) for line in out.splitlines()]
    assert [each.pop("event") for each in events] == [
        *("serving", "unclean", "status", "uncached", "failed", "stopped", "not_clean")
    ]
    assert events[0]["uris"] == ["nbd+unix:///disk?socket=/run/s"]
    assert events[1] == {"dirty_blocks": 3, "dirty_bytes": 3 << 16}
    assert events[2]["hit_ratio"] == 0.931
    assert events[2]["dirty_bytes"] == 3 << 16
    assert events[5] == {"dirty_blocks": 0, "dirty_bytes": 0}


def test_cache_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with reporting() as reporter:
        reporter.serving(PLAN, URIS)
        reporter.status(STATUS)
        drawn = len(terminal.getvalue())
        reporter.status(STATUS)
        assert len(terminal.getvalue()) == drawn, "drawn again for nothing"
    assert describe_status(STATUS) in terminal.getvalue()


# ---- uncache ----


def test_lines_of_an_uncache(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_uncache.uncache_reporter("disk", json=False) as reporter:
        reporter.draining(DRAINING)
        reporter.draining(DRAINING)
        reporter.stuck(DRAINING, 5.2)
        reporter.stuck(STUCK, 10.4)
        reporter.interrupted(None)
        reporter.interrupted(DRAINING)
        reporter.uncached(LINE)
    out, err = capsys.readouterr()
    assert out == "disk is /slow disk alone; /fast and /meta are not used any more\n"
    assert err.splitlines() == [
        "nbdtarget: disk: 3 dirty blocks to write back",
        "nbdtarget: disk: no block has been written back for 5 s (3 left); still trying",
        "nbdtarget: disk: no block has been written back for 10 s (3 left, 7 copies have"
        " failed, the last: writeback: /slow: full); still trying",
        "nbdtarget: disk: interrupted; nothing has been changed",
        "nbdtarget: disk: interrupted; 3 dirty blocks left. The device stays in service"
        " (mode writethrough, policy cleaner). Run the same command again to finish",
    ]


def test_json_of_an_uncache(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_uncache.uncache_reporter("disk", json=True) as reporter:
        reporter.draining(DRAINING)
        reporter.stuck(STUCK, 10.44)
        reporter.interrupted(None)
        reporter.interrupted(DRAINING)
        reporter.uncached(LINE)
    out, err = capsys.readouterr()
    assert err == ""
    left = {"dirty_blocks": 3, "dirty_bytes": 3 << 16}
    assert [json.loads(line) for line in out.splitlines()] == [
        {"event": "draining", **left, "errors": 0, "last_error": None},
        {
            "event": "stuck",
            **left,
            "errors": 7,
            "last_error": STUCK.last_error,
            "for_s": 10.4,
        },
        {"event": "interrupted"},
        {"event": "interrupted", **left, "errors": 0, "last_error": None},
        {
            "event": "uncached",
            "name": "disk",
            "origin": "/slow disk",
            "cache": "/fast",
            "metadata": "/meta",
        },
    ]


def test_uncache_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress_uncache.uncache_reporter("disk", json=False) as reporter:
        for nr_dirty in (4, 3, 0):
            now = Draining(
                dirty_blocks=nr_dirty,
                dirty_bytes=nr_dirty << 20,
                errors=0,
                last_error=None,
            )
            reporter.draining(now)
        reporter.uncached(LINE)
    assert "4.0/4.0 MiB" in terminal.getvalue()
    assert capsys.readouterr().out.startswith("disk is /slow disk alone")


def test_nothing_is_drawn_if_nothing_is_dirty(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    clean = Draining(dirty_blocks=0, dirty_bytes=0, errors=0, last_error=None)
    with progress_uncache.uncache_reporter("disk", json=False) as reporter:
        reporter.draining(clean)
        reporter.uncached(LINE)
    assert "writing back" not in terminal.getvalue()
