# SPDX-License-Identifier: Apache-2.0
"""Commands that print a URL."""

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

URL = parse_http_url("https://h/a?old#pin=size")


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


def test_commands_belong_to_one_image() -> None:
    set_url_commands({"https://h/a": ["sign", "a"]})
    try:
        assert url_command_for(URL) == ("sign", "a")
        assert url_command_for(parse_http_url("https://h/b")) == ()
        with pytest.raises(ResolveError):
            set_url_commands({"https://": ["x"]})
        assert url_command_for(URL) == ("sign", "a")
    finally:
        set_url_commands({})
    assert url_command_for(URL) == ()
