# SPDX-License-Identifier: Apache-2.0
"""Exactly what scripts that call dmsetup read.

Recorded from dmsetup 1.02.185 on a 6.12 kernel; devices by path instead of by number.
"""

import json

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture
def devices(cli: CommandLine, registry: object) -> None:
    """lin, two (linear and error) and bare, which has no table."""
    cli("create", "lin", "--table", "0 2048 linear /a 0")
    lines = ("0 1024 linear /a 2048", "1024 1024 error")
    cli("create", "two", "--table", lines[0], "--table", lines[1])
    cli("create", "bare", "--notable")


@pytest.mark.usefixtures("devices")
def test_a_target_type_leaves_out_devices_that_have_none(cli: CommandLine) -> None:
    for verb in ("status", "table"):
        assert cli(verb, "--target", "error") == "two: 1024 1024 error \n"
        assert cli(verb, "--target", "error", "lin") == ""
        assert cli(verb, "--target", "error", "lin", "bare") == ""
        assert cli(verb, "--target", "linear", "bare") == ""
        assert cli(verb, "--target", "nosuch") == ""
    both = "lin: 0 2048 linear \ntwo: 0 1024 linear \n"
    assert cli("status", "--target", "linear") == both
    assert cli("status", "--target", "linear", "lin", "two") == both
    assert cli("status", "bare") == "\n"
    assert cli("ls", "--target", "error") == "two\t(253, 1)\n"
    assert cli("ls", "--target", "nosuch") == ""
    answer = json.loads(cli("status", "--target", "error", "lin", "--json"))
    assert answer["devices"][0]["lines"] == []


@pytest.mark.usefixtures("registry")
def test_a_target_type_and_no_devices_at_all(cli: CommandLine) -> None:
    for verb in ("status", "table", "ls"):
        assert cli(verb, "--target", "error") == "No devices found\n"


@pytest.mark.usefixtures("registry")
def test_error_with_a_device_has_it_as_a_dependency_and_no_words(
    cli: CommandLine,
) -> None:
    for words, count in (
        ("", "0 dependencies\t:"),
        (" /a", "0 dependencies\t:"),
        (" a b c", "0 dependencies\t:"),
        (" /a 0", "1 dependencies\t: (/a)"),
    ):
        cli("create", "err", "--table", f"0 1024 error{words}")
        assert cli("table", "err") == "0 1024 error \n"
        assert cli("status", "err") == "0 1024 error \n"
        assert cli("deps", "err") == f"{count}\n"
        cli("remove", "err")
