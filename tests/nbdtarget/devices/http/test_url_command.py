# SPDX-License-Identifier: Apache-2.0
"""Commands that print a URL."""

import asyncio
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.http import url_command as module
from nbdtarget.devices.http.url import parse_http_url
from nbdtarget.devices.http.url_command import (
    run_url_command,
    set_url_commands,
    url_command_for,
)
from nbdtarget.devices.ranged.store import SourceAway
from tests.support.patience import until

URL = parse_http_url("https://h/a?old#pin=size")


def is_running(pid: int) -> bool:
    """Whether there is such a process, and it has not ended: nothing may be there to reap an orphan."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def test_printed_url_keeps_the_options() -> None:
    new = await run_url_command(["echo", "https://me:pw@g/b?new=%2F"], URL)
    assert new.url == "https://g/b?new=%2F"
    assert new.authorization
    assert new.options is URL.options


@pytest.mark.parametrize(
    ("command", "says"),
    [
        (
            ["/no/such/program"],
            "the command /no/such/program cannot be run: No such file",
        ),
        (
            ["sh", "-c", "echo https://h/a?secret; exit 3"],
            "the command sh ended with status 3",
        ),
        (["echo", "secret"], "what the command echo printed is not one URL"),
        (
            ["echo", "https://h/a https://h/secret"],
            "what the command echo printed is not one URL",
        ),
        (["echo", "file://h/secret"], "what the command echo printed is not one URL"),
        (["true"], "what the command true printed is not one URL"),
    ],
    ids=range(6),
)
async def test_failures_name_the_command_and_no_secret(
    command: list[str], says: str
) -> None:
    with pytest.raises(SourceAway) as caught:
        await run_url_command(command, URL)
    assert says in caught.value.reason
    assert "secret" not in caught.value.reason


async def test_command_that_hangs_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "COMMAND_S_MAX", 0.05)
    with pytest.raises(SourceAway, match="sleep did not end within"):
        await run_url_command(["sleep", "600"], URL)


async def test_command_ends_with_who_waits_for_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    command = ["sh", "-c", 'echo $$ > "$0.new"; mv "$0.new" "$0"; exec sleep 600']
    task = asyncio.create_task(run_url_command([*command, str(noted)], URL))
    await until(noted.exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not is_running(int(noted.read_text()))


async def test_what_a_command_has_started_is_ended_with_it(tmp_path: Path) -> None:
    noted = tmp_path / "pid"
    command = ["sh", "-c", 'sleep 600 & echo $! > "$0.new"; mv "$0.new" "$0"']
    task = asyncio.create_task(run_url_command([*command, str(noted)], URL))
    await until(noted.exists)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await until(lambda: not is_running(int(noted.read_text())))


async def test_command_that_prints_without_end_is_ended() -> None:
    with pytest.raises(SourceAway, match="what the command yes printed is not one URL"):
        await run_url_command(["yes", "https://h/a"], URL)


def test_commands_belong_to_one_image() -> None:
    set_url_commands({"https://h/a": ["sign", "a"], "s3://b/k#region=x": ["keys"]})
    try:
        assert url_command_for(URL.place) == ("sign", "a")
        assert url_command_for("https://h/b") == ()
        assert url_command_for("s3://b/k") == ("keys",)
        with pytest.raises(ResolveError):
            set_url_commands({"https://": ["x"]})
        assert url_command_for(URL.place) == ("sign", "a")
    finally:
        set_url_commands({})
    assert url_command_for(URL.place) == ()
