# SPDX-License-Identifier: Apache-2.0
"""A command that dmsetup refuses is refused here, with the same words of `strerror` and exit status 1.

Recorded with dmsetup 1.02.185. Where dmsetup prints its usage and ends with 1, or complains of a
missing argument, ours is a usage error: one line, exit status 2.
"""

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.control.api import ControlServer
from nbdtarget.control.verbs import Verbs
from tests.support.command_line import CommandLine
from tests.support.dm import make_registry

ZERO = "0 8 zero"
BUSY = "Device or resource busy"
INVALID = "Invalid argument"
GONE = "No such device or address"

# a, b (two lines, with a UUID), top on b, and n without a table.
REFUSED = [
    (["create", "a", "--table", ZERO], BUSY),
    (["create", "u2", "-u", "UUID-B", "--table", ZERO], BUSY),
    (["create", "u2", "-m", "0", "--table", ZERO], BUSY),
    (["create", "bad", "--table", "0 8 nosuch"], INVALID),
    (["create", "bad", "--table", "0 8 linear /nosuch 0"], "No such file or directory"),
    (["create", "bad", "--table", "0 8 linear"], INVALID),
    (["create", "bad", "--table", "0 8 linear /c 0 0"], INVALID),
    (["create", "bad", "--table", "1 8 zero"], INVALID),
    (["create", "bad", "--table", ZERO, "--table", "9 8 zero"], INVALID),
    (["create", "bad", "--table", "0 0 zero"], INVALID),
    (["create", "bad", "--table", "x"], "Invalid format on line 1 of table"),
    (["create", "bad", "/nosuch"], "No such file or directory"),
    (["create", "a/b", "--table", ZERO], INVALID),
    (["create", "--concise", f"a,,,rw,{ZERO}"], BUSY),
    (["create", "--concise", f"c9,,,xx,{ZERO}"], "Invalid flags parameter"),
    (["create", "--concise", "c9"], "Five comma-separated fields are required"),
    (["remove", "b"], BUSY),
    (["remove", "nosuch"], GONE),
    (["remove", "-u", "NOSUCH"], "Device does not exist"),
    (["load", "nosuch", "--table", ZERO], GONE),
    (["load", "a", "--table", "0 8 nosuch"], INVALID),
    (["clear", "nosuch"], GONE),
    (["suspend", "nosuch"], GONE),
    (["resume", "nosuch"], GONE),
    (["resume", "hung"], INVALID),
    (["wipe_table", "nosuch"], GONE),
    (["rename", "a", "b"], BUSY),
    (["rename", "nosuch", "x"], GONE),
    (["rename", "b", "--setuuid", "UUID-B2"], INVALID),
    (["rename", "a", "--setuuid", "UUID-B"], BUSY),
    (["message", "a", "0", "hello"], INVALID),
    (["message", "a", "999999", "hello"], INVALID),
    (["message", "nosuch", "0", "hello"], GONE),
    (["wait", "nosuch"], GONE),
    (["status", "nosuch"], "Device does not exist"),
    (["status", "a", "nosuch"], "Device does not exist"),
    (["table", "nosuch"], "Device does not exist"),
    (["info", "nosuch"], "Device does not exist"),
    (["info", "-c", "-o", "name,nosuch"], "Unrecognised field: nosuch"),
    (["deps", "nosuch"], "Device does not exist"),
    (["ls", "--tree", "-o", "nosuch"], "Tree options not recognised: nosuch"),
    (["ls", "-o", "nosuch"], "Option not recognised: nosuch"),
]

USAGE = [
    [],
    ["nosuch"],
    ["create"],
    ["load"],
    ["reload"],
    ["clear"],
    ["remove"],
    ["suspend"],
    ["resume"],
    ["wait"],
    ["wait", "a", "x"],
    ["rename"],
    ["rename", "a"],
    ["message", "a"],
    ["message", "a", "0"],
    ["message", "a", "x", "hello"],
    ["info", "--noheadings", "-o", "name"],
]


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The control socket of a server in a thread; a, b, n, hung and top are on it."""
    registry, _ = make_registry(a=32 << 20, b=32 << 20, c=32 << 20)
    path = tmp_path_factory.mktemp("errors") / "control.sock"
    loop = asyncio.new_event_loop()
    server = ControlServer(Verbs(registry), path)

    async def start() -> None:
        await server.start()
        await registry.create("a", "0 8 linear /a 0")
        lines = "0 8 linear /b 8\n8 8 linear /a 8"
        await registry.create("b", lines, uuid="UUID-B")
        await registry.create("n", None)
        await registry.create("hung", None)
        await registry.suspend("hung")
        await registry.create("top", "0 16 linear /dev/mapper/b 0")

    loop.run_until_complete(start())
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    yield path
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.run_until_complete(server.close())
    loop.run_until_complete(registry.close())
    loop.close()


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, control: Path
) -> CommandLine:
    monkeypatch.setenv("NBDTARGET_CONTROL", str(control))
    return CommandLine(capsys)


@pytest.mark.parametrize(
    ("argv", "text"), REFUSED, ids=[" ".join(argv) for argv, _ in REFUSED]
)
def test_refused_with_the_words_that_dmsetup_has(
    cli: CommandLine, argv: list[str], text: str
) -> None:
    before = cli("info"), cli("table"), cli("table", "--inactive")
    assert text in cli(*argv, status=1)
    assert (cli("info"), cli("table"), cli("table", "--inactive")) == before


@pytest.mark.parametrize("argv", USAGE, ids=" ".join)
def test_usage_is_exit_status_2(cli: CommandLine, argv: list[str]) -> None:
    assert cli(*argv, status=2)


@pytest.mark.parametrize(
    "argv",
    [
        ["resume", "n"],
        ["suspend", "n"],
        ["suspend", "hung"],
        ["clear", "n"],
        ["clear", "a"],
        ["wait", "a", "1"],
        ["remove", "--deferred", "b"],
        ["message", "b", "0", "@cancel_deferred_remove"],
    ],
    ids=" ".join,
)
def test_options_that_dmsetup_ignores_are_ignored(
    cli: CommandLine, argv: list[str]
) -> None:
    cli(*argv)


def test_message_to_a_device_without_a_table_is_enxio(cli: CommandLine) -> None:
    # The kernel, through dmsetup, says EINVAL; older ones said nothing at all.
    assert GONE in cli("message", "n", "0", "hello", status=1)


def test_empty_table_is_refused(
    cli: CommandLine,
) -> None:
    assert "Empty table" in cli("create", "bad", "--table", "", status=1)
