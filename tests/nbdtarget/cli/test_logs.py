# SPDX-License-Identifier: Apache-2.0
"""The log of a server: it never raises, never blocks, and no client can fill it."""

import io
import json
import logging
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from typing import TextIO

import pytest

from nbdtarget.cli.logs import (
    CLIENT_LINES_BURST,
    CLIENT_LINES_PER_S,
    Journal,
    Json,
    LogHandler,
    Plain,
    is_journal,
)
from nbdtarget.cli.outlet import Outlet
from tests.support.patience import PATIENCE_S


def told(nr: int) -> str:
    return f"lost {nr}"


class Pipe:
    """A stream into a pipe, and its other end."""

    def __init__(self) -> None:
        self.read_fd, write_fd = os.pipe()
        self.stream: TextIO = os.fdopen(write_fd, "w")
        self.outlet = Outlet(lambda: self.stream, told)

    def read(self) -> str:
        data = b""
        while select.select([self.read_fd], [], [], 0)[0]:
            piece = os.read(self.read_fd, 1 << 16)
            if not piece:
                break
            data += piece
        return data.decode()


@pytest.fixture
def pipe() -> Iterator[Pipe]:
    it = Pipe()
    yield it
    it.stream.close()
    os.close(it.read_fd)


def test_a_full_pipe_blocks_nothing_and_lost_lines_are_counted(
    pipe: Pipe,
) -> None:
    for _ in range(100):
        pipe.outlet.write_line("x" * 10_000)
    assert pipe.outlet.nr_lost > 50
    lost = pipe.outlet.nr_lost
    assert set(pipe.read()) == {"x", "\n"}
    pipe.outlet.write_line("at last")
    assert pipe.read().split() == ["lost", str(lost), "at", "last"]


def test_a_closed_pipe_raises_nothing() -> None:
    read_fd, write_fd = os.pipe()
    os.close(read_fd)
    with os.fdopen(write_fd, "w") as stream:
        outlet = Outlet(lambda: stream, told)
        outlet.write_line("one")
        outlet.write_line("two")
        assert outlet.nr_lost == 2


@pytest.mark.parametrize("is_closed", [True, False])
def test_no_stderr_at_all_raises_nothing(is_closed: bool) -> None:
    stream = io.StringIO()
    stream.close()
    outlet = Outlet(lambda: stream if is_closed else None, told)
    outlet.write_line("one")
    assert outlet.nr_lost == 1


def test_a_full_disk_raises_nothing() -> None:
    with open("/dev/full", "w") as stream:
        outlet = Outlet(lambda: stream, told)
        outlet.write_line("one")
        assert outlet.nr_lost == 1


class _Log:
    def __init__(self, pipe: Pipe) -> None:
        self.now_ns = 0
        self.handler = LogHandler(pipe.outlet, lambda: self.now_ns)

    def log(self, name: str, message: str, *args: object) -> None:
        record = logging.LogRecord(name, logging.INFO, "f", 7, message, args, None)
        self.handler.emit(record)


def test_lines_about_clients_are_bounded_and_others_are_not(pipe: Pipe) -> None:
    log = _Log(pipe)
    for _ in range(CLIENT_LINES_BURST + 50):
        log.log("nbdtarget.server.connection", "attached")
    assert pipe.read().count("attached") == CLIENT_LINES_BURST
    log.log("nbdtarget.dm.registry", "a device")
    assert (
        pipe.read()
        == "nbdtarget: 50 lines about clients were left out\nnbdtarget: a device\n"
    )
    log.now_ns += 10**9
    for _ in range(100):
        log.log("nbdtarget.control.http", "asked")
    assert pipe.read().count("asked") == CLIENT_LINES_PER_S


def test_a_log_line_with_a_mistake_is_still_written(pipe: Pipe) -> None:
    log = _Log(pipe)
    log.log("nbdtarget.dm", "%d", "no number")
    assert "nbdtarget.dm:7: log line: TypeError" in pipe.read()


def test_log_entry_is_one_line_whatever_a_name_contains(pipe: Pipe) -> None:
    log = _Log(pipe)
    log.log(
        "nbdtarget.dm", "%s: refused", "a\nnbdtarget: all is well\x1b[2J" + "x" * 10**6
    )
    (line,) = pipe.read().splitlines()
    assert line.startswith(r"nbdtarget: a\nnbdtarget: all is well\x1b[2Jxxx")
    assert len(line) < 5000


SERVER = """
import logging, sys
from nbdtarget.cli.logs import Log
from nbdtarget.cli.progress.common import print_event, say
Log(verbose=True).start()
for nr in range(20_000):
    logging.getLogger("nbdtarget.dm").info("line %d of the log, which is not read", nr)
    say("line")
    print_event(event="progress", nr=nr)
"""


@pytest.mark.parametrize("is_closed", [True, False])
def test_a_process_whose_output_is_not_read_still_ends(is_closed: bool) -> None:
    pipe = subprocess.PIPE
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(command, stdout=pipe, stderr=pipe) as process:
        if is_closed:
            assert process.stdout is not None
            assert process.stderr is not None
            process.stdout.close()
            process.stderr.close()
        assert process.wait(PATIENCE_S) == 0


def record(level: int, message: str, *, fails: bool = False) -> logging.LogRecord:
    made = logging.LogRecord("nbdtarget.dm", level, "f.py", 7, message, None, None)
    if fails:
        try:
            raise ValueError("what was wrong")
        except ValueError:
            made.exc_info = sys.exc_info()
    return made


def emitted(pipe: Pipe, style: Plain, made: logging.LogRecord) -> list[str]:
    LogHandler(pipe.outlet, style=style).emit(made)
    return pipe.read().splitlines()


@pytest.mark.parametrize(
    ("level", "priority"),
    [("CRITICAL", 2), ("ERROR", 3), ("WARNING", 4), ("INFO", 6), ("DEBUG", 7)],
)
def test_the_journal_gets_priorities(pipe: Pipe, level: str, priority: int) -> None:
    made = record(getattr(logging, level), "disk lost")
    assert emitted(pipe, Journal(), made) == [f"<{priority}>nbdtarget: disk lost"]


def test_each_line_of_a_traceback_has_the_priority(pipe: Pipe) -> None:
    lines = emitted(pipe, Journal(), record(logging.ERROR, "failed", fails=True))
    assert lines[0] == "<3>nbdtarget: failed"
    assert lines[-1] == "<3>ValueError: what was wrong"
    assert all(line.startswith("<3>") for line in lines)


def test_a_line_of_json_is_an_object(pipe: Pipe) -> None:
    made = record(logging.WARNING, 'a "quoted" name', fails=True)
    made.created = 1796070000.25
    (line,) = emitted(pipe, Json(), made)
    fields = json.loads(line)
    assert "ValueError: what was wrong" in fields.pop("traceback")
    assert fields == {
        "time": "2026-11-30T20:20:00.250+00:00",
        "level": "warning",
        "logger": "nbdtarget.dm",
        "message": 'a "quoted" name',
    }


def test_lines_that_were_lost_have_the_form_of_all_others() -> None:
    assert Plain().line("3 lines were lost") == "nbdtarget: 3 lines were lost"
    assert Journal().line("3 lines were lost") == "<4>nbdtarget: 3 lines were lost"
    fields = json.loads(Json().line("3 lines were lost"))
    assert (fields["level"], fields["message"]) == ("warning", "3 lines were lost")


def test_the_journal_is_known_by_its_file(pipe: Pipe) -> None:
    there = os.fstat(pipe.stream.fileno())
    said = {"JOURNAL_STREAM": f"{there.st_dev}:{there.st_ino}"}
    assert is_journal(pipe.stream, said)
    assert not is_journal(pipe.stream, {})
    assert not is_journal(pipe.stream, {"JOURNAL_STREAM": f"{there.st_dev}:1"})
    assert not is_journal(None, said)
    assert not is_journal(io.StringIO(), said)
