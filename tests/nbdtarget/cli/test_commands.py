# SPDX-License-Identifier: Apache-2.0
"""Tests that every command must pass, and exactly what the commands print."""

import errno
import io
import json
import re
import sys
from pathlib import Path

import pytest

from nbdtarget import __version__
from nbdtarget.cli.app import run
from nbdtarget.dm.registry import Registry
from tests.support.command_line import CommandLine

# Every command with the least arguments that it takes.
COMMANDS: dict[str, list[str]] = {
    "access": [],
    "advise": ["/nonexistent/trace"],
    "cache": ["/nonexistent/origin", "/nonexistent/cache"],
    "clear": ["x"],
    "clone": ["/nonexistent/source", "/nonexistent/dest"],
    "completion": ["bash"],
    "create": ["x", "--notable"],
    "deps": [],
    "doctor": [],
    "events": [],
    "export": ["/nonexistent/disk"],
    "help": [],
    "info": [],
    "load": ["x", "--table", "0 8 zero"],
    "ls": [],
    "mangle": [],
    "measure": [],
    "message": ["x", "0", "word"],
    "metadata": [],
    "reload": ["x", "--table", "0 8 zero"],
    "page": [],
    "remove": ["x"],
    "remove_all": [],
    "rename": ["x", "y"],
    "replay-log": ["--log", "/nonexistent/log"],
    "reset": ["x"],
    "resume": ["x"],
    "scratch": ["/nonexistent/image"],
    "serve": ["--listen", "nonsense"],
    "setgeometry": ["x", "1", "1", "1", "0"],
    "splitname": ["vg-lv"],
    "sources": [],
    "stats": [],
    "status": [],
    "suspend": ["x"],
    "table": [],
    "target-version": ["linear"],
    "targets": [],
    "top": [],
    "torture": ["true"],
    "uncache": ["x"],
    "upgrade": [],
    "version": [],
    "wait": ["x"],
    "wipe_table": ["x"],
}
NOT_ASKING = {
    "advise",
    "cache",
    "clone",
    "export",
    "completion",
    "doctor",
    "sources",
    "help",
    "metadata",
    "replay-log",
    "scratch",
    "serve",
    "splitname",
    "stats",
    "torture",
    "version",
}
ASKING = sorted(COMMANDS.keys() - NOT_ASKING)
PRINTING = ["deps", "info", "ls", "measure", "status", "table", "targets", "version"]


def test_battery_knows_every_command(cli: CommandLine) -> None:
    listed = cli("--help").partition("Commands:\n")[2]
    assert {line.split()[0] for line in listed.splitlines()} == COMMANDS.keys()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help(cli: CommandLine, command: str) -> None:
    assert cli(command, "--help").startswith(f"Usage: nbdtarget {command} ")


@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"message"}))
def test_bad_option(cli: CommandLine, command: str) -> None:
    assert "--nonsense" in cli(command, "--nonsense", *COMMANDS[command], status=2)


@pytest.mark.parametrize(
    "command", sorted(name for name, arguments in COMMANDS.items() if arguments)
)
def test_missing_argument(cli: CommandLine, command: str) -> None:
    if command != "serve":
        assert re.search("Missing (argument|option)", cli(command, status=2))


def test_no_command_and_unknown_command(cli: CommandLine) -> None:
    assert "Missing command" in cli(status=2)
    assert "nonsense" in cli("nonsense", status=2)


@pytest.mark.parametrize("command", ASKING)
def test_no_server(cli: CommandLine, command: str, tmp_path: Path) -> None:
    line = cli(command, *COMMANDS[command], status=1)
    assert f"no server on {tmp_path}/nbdtarget/control.sock" in line
    line = cli(command, "--control", "/nowhere/c", *COMMANDS[command], status=1)
    assert "no server on /nowhere/c" in line


@pytest.mark.parametrize("command", ["serve", "cache", "clone"])
def test_bad_input_of_what_serves(cli: CommandLine, command: str) -> None:
    assert cli(command, *COMMANDS[command], status=1)


@pytest.mark.parametrize("command", PRINTING)
@pytest.mark.usefixtures("registry")
def test_json_of_an_empty_server(cli: CommandLine, command: str) -> None:
    assert isinstance(json.loads(cli(command, "--json")), dict)


@pytest.mark.parametrize(
    "command", ["deps", "info", "ls", "measure", "status", "table"]
)
@pytest.mark.usefixtures("registry")
def test_no_devices(cli: CommandLine, command: str) -> None:
    assert cli(command) == "No devices found\n"


@pytest.mark.parametrize(
    "command",
    ["deps", "info", "measure", "status", "table", "remove", "resume", "wait"],
)
@pytest.mark.usefixtures("registry")
def test_unknown_device(cli: CommandLine, command: str) -> None:
    line = (
        f"nbdtarget: {command} nosuch: Device does not exist"
        " (No such device or address)\n"
    )
    assert cli(command, "nosuch", status=1) == line


# The following outputs were recorded from dmsetup and a 6.12 kernel, with devices by path.


@pytest.mark.usefixtures("registry")
def test_info_as_recorded(cli: CommandLine) -> None:
    cli("create", "c", "--table", "0 65536 linear /b 0")
    assert cli("info", "c") == (
        "Name:              c\n"
        "State:             ACTIVE\n"
        "Read Ahead:        256\n"
        "Tables present:    LIVE\n"
        "Open count:        0\n"
        "Event number:      0\n"
        "Major, minor:      253, 0\n"
        "Number of targets: 1\n"
        "\n"
    )


@pytest.mark.usefixtures("registry")
def test_linear_as_recorded(cli: CommandLine) -> None:
    cli("create", "c", "--table", "0 65536 zero")
    cli("load", "c", "--table", "0 65536 linear /b 0")
    cli("suspend", "c")
    cli("resume", "c")
    assert cli("status", "c") == "0 65536 linear \n"
    assert cli("table", "c") == "0 65536 linear /b 0\n"


@pytest.mark.usefixtures("registry")
def test_targets_as_recorded(cli: CommandLine) -> None:
    lines = cli("targets").splitlines()
    assert "linear           v1.4.0" in lines
    assert "error            v1.7.0" in lines
    assert "clone            v1.0.0" in lines


@pytest.mark.usefixtures("registry")
def test_three_line_table_as_recorded(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    text = "0 16384 linear /c 0\n16384 8 error\n16392 49144 linear /c 16392\n"
    (tmp_path / "table").write_text(text)
    monkeypatch.setattr(sys, "stdin", io.StringIO(text))
    cli("create", "stdin")
    assert cli("table", "stdin").replace("error \n", "error\n") == text
    cli("remove", "stdin")
    cli("create", "file", str(tmp_path / "table"))
    cli("remove", "file")
    lines = [word for line in text.splitlines() for word in ("--table", line)]
    cli("create", "lines", *lines)
    assert "Number of targets: 3\n" in cli("info", "lines")


@pytest.mark.usefixtures("registry")
def test_several_devices_have_their_names_before_each_line(cli: CommandLine) -> None:
    cli("create", "x", "--table", "0 8 zero")
    assert cli("status") == "x: 0 8 zero \n"
    cli("create", "y", "--notable")
    assert cli("status") == "x: 0 8 zero \ny: \n"
    assert cli("table", "y", "x") == "y: \nx: 0 8 zero \n"
    assert cli("status", "--target", "zero", "x") == "0 8 zero \n"
    assert cli("ls") == "x\t(253:0)\ny\t(253:1)\n"
    assert cli("ls", "--target", "zero") == "x\t(253, 0)\n"
    assert cli("ls", "-o", "devname") == "x\t(x)\ny\t(y)\n"
    assert cli("ls", "-o", "blkdevname") == "x\t(dm-0)\ny\t(dm-1)\n"
    assert "Option not recognised: nix" in cli("ls", "-o", "nix", status=1)


@pytest.mark.usefixtures("registry")
def test_tree_and_deps(cli: CommandLine) -> None:
    cli("create", "lower", "--table", "0 8 linear /a 0")
    cli("create", "upper", "--table", "0 8 linear /dev/mapper/lower 0")
    tree = "upper (253:1)\n `-lower (253:0)\n    `- (/a)\n"
    assert cli("ls", "--tree", "-o", "ascii") == tree
    assert cli(
        "info", "-c", "--noheadings", "-o", "name,devs_used,names_using_dev"
    ) == ("lower::upper\nupper:lower:\n")
    assert cli("deps", "lower") == "1 dependencies\t: (/a)\n"


@pytest.mark.usefixtures("registry")
def test_info_of_other_states(cli: CommandLine) -> None:
    cli("create", "x", "--readonly", "--uuid", "U-1", "--table", "0 8 zero")
    cli("load", "x", "--table", "0 8 error")
    cli("suspend", "x")
    text = cli("info", "x")
    assert "State:             SUSPENDED (READ-ONLY)\n" in text
    assert "Tables present:    LIVE & INACTIVE\n" in text
    assert "UUID: U-1\n" in text
    assert cli("info", "-c").splitlines()[1] == (
        "x                253   0 LIsr    0    1      0 U-1                             "
    )
    assert cli("info", "-u", "U-1") == text
    reason = "UUID nix: Device does not exist"
    assert reason in cli("info", "-u", "nix", status=1)
    assert "These options are for columns: give -c" in cli(
        "info", "-o", "name", status=2
    )
    assert "blkdevname" in cli("info", "-c", "-o", "help")


def test_rotational_can_be_set(cli: CommandLine, registry: Registry) -> None:
    cli("create", "x", "--rotational", "--table", "0 8 linear /a 0")
    cli("create", "y", "--no-rotational", "--table", "0 8 linear /b 0")
    cli("create", "z", "--table", "0 8 linear /c 0")
    devices = json.loads(cli("info", "--json"))["devices"]
    assert [each["rotational"] for each in devices] == [True, False, False]
    config = cli("table", "--config")
    assert [line for line in config.splitlines() if "rotational" in line] == [
        "rotational = true",
        "rotational = false",
    ]
    cli("message", "z", "0", "@rotational", "yes")
    assert registry.get("z").is_rotational
    assert "--concise takes one argument" in cli(
        "create", "--rotational", "--concise", "w,,,,0 8 zero", status=2
    )


def test_latched_lost_and_failing_disks_below_are_shown(
    cli: CommandLine, registry: Registry
) -> None:
    cli("create", "low", "--table", "0 8 linear /a 0\n8 8 linear /b 0")
    cli("create", "top", "--table", "0 8 linear /dev/mapper/low 0\n8 8 linear /c 0")
    cli("create", "well", "--table", "0 8 linear /c 0")
    healthy = cli("info", "top")
    below = {each.name: each for each in registry.get("top").devices_below()}
    assert list(below) == ["/a", "/b", "/c"]
    below["/a"].health.note_error("flush", errno.EIO)
    below["/a"].health.latch(errno.EIO)
    below["/b"].health.lose(errno.ENOTCONN)
    below["/c"].health.note_error("write", errno.ENOSPC)
    below["/c"].health.note_loss()
    for name in ("low", "top"):
        text = cli("info", name)
        assert re.search(
            r"\nBelow: +/a: latched since [-: 0-9]+ \(Input/output error\): no FLUSH"
            r" succeeds until the disk is opened again: load its table again; failed: 1"
            r" flush, last flush: Input/output error\n",
            text,
        )
        assert re.search(r"\nBelow: +/b: lost since [-: 0-9]+ \(Transport end", text)
    assert cli("info", "top").startswith(healthy.split("Event")[0])
    assert "/c: failed: 1 write, last write: No space left on device; unflushed" in text
    assert re.search(r"\nLosses: +unflushed writes may have been lost 1 times\n", text)
    assert cli("ls").splitlines() == [
        "low\t(253:0) latched: /a lost: /b",
        "top\t(253:1) latched: /a lost: /b",
        "well\t(253:2)",
    ]
    rows = cli("info", "-c", "--noheadings", "-o", "name,health,losses")
    assert rows == "low:lost:0\ntop:lost:1\nwell:ok:1\n"
    assert cli("info", "-c", "--noheadings", "-o", "name", "-S", "health!=ok") == (
        "low\ntop\n"
    )
    for verb in ("status", "info"):
        (device,) = json.loads(cli(verb, "top", "--json"))["devices"]
        shown = {each["name"]: each for each in device["below"]}
        assert {name: each["state"] for name, each in shown.items()} == {
            "/a": "latched",
            "/b": "lost",
            "/c": "ok",
        }
        assert shown["/a"]["errno"] == errno.EIO
        assert shown["/a"]["since_s"] > 0
        assert shown["/a"]["errors"] == {"flush": 1}
        assert shown["/a"]["last_error"] == "flush: Input/output error"
        assert (shown["/c"]["losses"], device["losses"]) == (1, 1)


@pytest.mark.usefixtures("registry")
def test_ls_exec_runs_a_command_for_each_device(
    cli: CommandLine, tmp_path: Path
) -> None:
    cli("create", "x", "--table", "0 8 zero")
    cli("create", "y", "--notable")
    out = tmp_path / "out"
    cli("ls", "--exec", f"sh -c 'echo \"$@\" >> {out}' sh 'a b'")
    assert out.read_text() == "a b /dev/mapper/x\na b /dev/mapper/y\n"
    assert "/no/such: No such file" in cli("ls", "--exec", "/no/such", status=1)


@pytest.mark.usefixtures("registry")
def test_message(cli: CommandLine) -> None:
    cli("create", "x", "--table", "0 8 probe /a /b")
    assert cli("message", "x", "0", "say", "-1") == "say -1\n"
    assert cli("message", "x", "0", "--", "say", "-1", "--json") == "say -1 --json\n"
    assert cli("message", "x", "0", "say two") == "say two\n"
    assert json.loads(cli("message", "--json", "x", "0", "say")) == {"text": "say"}
    assert cli("message", "x", "0", "event") == ""
    assert json.loads(cli("wait", "--json", "x", "0")) == {"event_nr": 1}
    assert "Invalid argument" in cli("message", "x", "99", "say", status=1)
    assert "SECTOR" in cli("message", "x", "y", "say", status=2)


@pytest.mark.usefixtures("registry")
def test_verbs_that_print_nothing(cli: CommandLine) -> None:
    cli("create", "x", "--table", "0 8 zero")
    cli("reload", "x", "--table", "0 8 error")
    cli("clear", "x")
    cli("rename", "x", "y")
    cli("wipe_table", "y")
    assert cli("table", "y") == "0 8 error \n"
    assert "busy" in cli("create", "y", "--notable", status=1)
    cli("remove", "--force", "y")
    cli("create", "z", "--notable")
    cli("remove_all")
    assert cli("ls") == "No devices found\n"


def test_remove_all_names_the_devices_that_stay(
    cli: CommandLine, registry: Registry, capsys: pytest.CaptureFixture[str]
) -> None:
    cli("create", "x", "--table", "0 8 zero")
    device = registry.acquire("x")
    assert run(["remove_all"]) == 0
    assert (
        capsys.readouterr().err
        == "nbdtarget: remove_all: x is in use and was not removed\n"
    )
    registry.release(device)


@pytest.mark.usefixtures("registry")
def test_table_from_what_is_not_a_table(
    cli: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    for file in ("missing", "binary", "."):
        cli("create", "x", str(tmp_path / file), status=1)
    cli("create", "x", "--table", "0 8 zero", str(tmp_path / "f"), status=2)
    cli("create", "x", "--notable", "--table", "0 8 zero", status=2)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    assert "Empty table" in cli("create", "x", status=1)
    assert cli("ls") == "No devices found\n"


@pytest.mark.usefixtures("registry")
def test_version_of_the_server(cli: CommandLine) -> None:
    lines = cli("version").splitlines()
    assert lines[0].startswith("nbdtarget version: ")
    assert lines[1].startswith("Server version: ")


@pytest.mark.usefixtures("registry")
def test_concise_devices_are_created_and_printed(
    cli: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "a,U\\,A,3,rw,0 8 zero ,8 8 error ;n,,0,rw;r,,5,ro,0 8 zero "
    assert cli("create", "--concise", text) == ""
    assert cli("table", "--concise") == text + "\n"
    assert cli("table", "--concise", "n") == "n,,0,rw\n"
    cli("remove_all")
    monkeypatch.setattr(sys, "stdin", io.StringIO(text + "\n"))
    cli("create", "--concise")
    assert cli("table", "--concise") == text + "\n"
    error = cli("create", "--concise", "b,,,,0 8 zero;a,,,,0 8 zero", status=1)
    assert error == ("nbdtarget: create a: Device or resource busy: name exists\n")
    assert "b:" in cli("table")
    assert "takes one argument" in cli("create", "--concise", "x", "-r", status=2)
    assert "minor exists" in cli("create", "c", "-m", "3", "--notable", status=1)


def test_setuuid_deferred_remove_and_retry(
    cli: CommandLine, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    cli("create", "low", "--table", "0 8 zero")
    cli("create", "top", "--table", "0 8 linear /dev/mapper/low 0")
    cli("rename", "low", "--setuuid", "U-1")
    assert "UUID: U-1\n" in cli("info", "low")
    said = cli("rename", "low", "--setuuid", "U", status=1)
    assert said.startswith("nbdtarget: rename low: ")
    assert "the device has a UUID" in said
    monkeypatch.setattr("nbdtarget.cli.devices.RETRY_S", 0.0)
    busy = (
        "nbdtarget: remove low: Device or resource busy: in use by the table of top\n"
    )
    assert cli("remove", "--retry", "low", status=1) == busy
    cli("remove", "--deferred", "-u", "U-1")
    assert "State:             ACTIVE (DEFERRED REMOVE)\n" in cli("info", "low")
    cli("message", "low", "0", "@cancel_deferred_remove")
    assert "DEFERRED" not in cli("info", "low")
    cli("remove", "--deferred", "low")
    cli("remove", "top")
    assert cli("ls") == "No devices found\n"


def test_version_of_the_program(cli: CommandLine) -> None:
    name, _, fast_path = cli("--version").partition(", ")
    assert name == f"nbdtarget {__version__}"
    assert fast_path.startswith("fast path: ")
