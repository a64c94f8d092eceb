# SPDX-License-Identifier: Apache-2.0
"""Helper: a child on a socket that is ours; it is started again, ended, and its words go to the log."""

import asyncio
import contextlib
import os
import socket
import sys
import tempfile
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper import process
from nbdtarget.devices.helper.process import Helper, PrivateSocket
from tests.support.patience import PATIENCE_S, until

ACCEPT = (
    "import os, socket, sys;"
    "s = socket.socket(fileno=3);"
    "c = s.accept()[0]; c.send(b'%d' % os.getpid()); c.recv(1)"
)


def connected(path: str) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(PATIENCE_S)
    sock.connect(path)
    return sock


def test_socket_has_no_name_and_leaves_nothing_behind() -> None:
    before = set(os.listdir(tempfile.gettempdir()))
    private = PrivateSocket()
    after = set(os.listdir(tempfile.gettempdir()))
    assert not [name for name in after - before if name.startswith("nbdtarget-")]
    with connected(private.path) as client:
        server, _ = private.listener.accept()
        server.send(b"x")
        assert client.recv(1) == b"x"
        server.close()
    private.close()


def test_socket_with_a_long_path_of_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("d" * 150)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    private = PrivateSocket()
    assert list(long.iterdir()) == []
    private.close()


async def test_it_is_started_again_on_the_same_socket() -> None:
    helper = Helper("d", ["python3", "-c", ACCEPT])
    pids = []
    for _ in range(2):
        await helper.start()
        assert helper.runs
        await helper.start()  # it runs: nothing is done
        with connected(helper.socket_path) as client:
            pids.append(int(client.recv(20)))
        await helper.ended()
        assert not helper.runs
        assert helper.pid is None
    assert pids[0] != pids[1]
    await helper.close()


def processes(mark: str) -> list[int]:
    """The processes that have this word among their arguments."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            if mark.encode() in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


async def test_two_that_start_it_at_the_same_time_start_one(tmp_path: Path) -> None:
    # Not `python3`, which may be a script whose shells have the same words.
    helper = Helper("d", [sys.executable, "-c", ACCEPT, str(tmp_path)])
    await asyncio.gather(*(helper.start() for _ in range(3)))
    # A process has no words for a moment, in which it takes on its program.
    await until(lambda: helper.pid in processes(str(tmp_path)))
    assert processes(str(tmp_path)) == [helper.pid]
    await helper.close()
    assert processes(str(tmp_path)) == []


@pytest.mark.parametrize("is_cancelled", [False, True], ids=["closed", "cancelled"])
@pytest.mark.parametrize("nr_turns", [0, 1, 2, 3, 5, 8])
async def test_nothing_runs_after_a_close_while_it_starts(
    tmp_path: Path, nr_turns: int, is_cancelled: bool
) -> None:
    helper = Helper("d", ["python3", "-c", ACCEPT, str(tmp_path)])
    start = asyncio.ensure_future(helper.start())
    for _ in range(nr_turns):
        await asyncio.sleep(0)
    if is_cancelled:
        start.cancel()
    await helper.close()
    await asyncio.wait([start])
    if not start.cancelled() and (error := start.exception()):
        assert "is closed" in str(error)
    await until(lambda: not processes(str(tmp_path)))
    with pytest.raises(ResolveError, match="is closed"):
        await helper.start()


async def test_its_words_go_to_the_log_and_into_the_reason(
    caplog: pytest.LogCaptureFixture,
) -> None:
    script = "echo 'sh: first' >&2; echo; printf 'sh: it is \\033[1mbroken' >&2; exit 4"
    helper = Helper("web", ["sh", "-c", script])
    await helper.start()
    await helper.ended()
    assert "web: sh: first" in caplog.text
    told = helper.why_it_ended()
    assert told == "sh ended with status 4: it is \\x1b[1mbroken"
    assert f"web: {told}" in caplog.text
    await helper.close()


async def test_flood_of_words_is_bounded(caplog: pytest.LogCaptureFixture) -> None:
    script = "i=0; while [ $i -lt 300 ]; do echo line >&2; i=$((i+1)); done; head -c 200000 /dev/zero | tr '\\0' x >&2"
    helper = Helper("web", ["sh", "-c", script])
    await helper.start()
    await helper.ended()
    lines = [each for each in caplog.messages if each.startswith("web: sh: line")]
    assert process.LINES_MAX <= len(lines) <= process.LINES_MAX + 2
    assert max(map(len, caplog.messages)) < 1000
    await helper.close()


async def test_it_is_killed_if_it_does_not_end(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(process, "END_S_MAX", 0.3)
    script = (
        "import signal, socket, time;"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN);"
        "socket.socket(fileno=3).accept()[0].send(b'x'); time.sleep(600)"
    )
    helper = Helper("d", ["python3", "-c", script])
    await helper.start()
    with connected(helper.socket_path) as client:
        assert client.recv(1) == b"x"
    await helper.close()
    assert not helper.runs
    assert helper.why_it_ended() == "python3 was ended by SIGKILL"
    assert not caplog.messages  # it was to end


async def test_what_it_has_started_ends_with_it() -> None:
    # The grandchild keeps the standard error open.
    script = "sleep 600 & echo $! >&2; exit 1"
    helper = Helper("d", ["sh", "-c", script])
    await helper.start()
    await helper.ended()
    assert int(helper.last_words) > 0
    assert helper.why_it_ended().startswith("sh ended with status 1")
    await helper.close()


async def test_program_that_is_missing() -> None:
    helper = Helper("d", ["no-such-program"])
    with pytest.raises(
        ResolveError, match="d: the program no-such-program is not there"
    ):
        await helper.start()
    assert helper.why_it_ended() == "no-such-program did not start"
    await helper.close()
