# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget access`, on a server in this process."""

import json

import pytest

from tests.support.command_line import CommandLine, in_process


@pytest.fixture(autouse=True)
def disk(cli: CommandLine, registry: object) -> None:
    cli("create", "disk", "--table", "0 2048 linear /a 0")


def test_everybody_may_attach_at_first(cli: CommandLine) -> None:
    assert cli("access") == "disk: rw any\nother exports: rw any\n"
    assert cli("access", "disk") == "disk: rw any\n"
    assert cli("access", "nothing", status=1) == (
        "nbdtarget: access nothing: there is no such export, and there are no rules for it (No such device or address)\n"
    )


def test_rules_are_set_shown_and_dropped(cli: CommandLine) -> None:
    cli("access", "disk", "rw  cert:alice", "ro uid:0")
    assert cli("access", "disk") == "disk: rw cert:alice; ro uid:0\n"
    answer = json.loads(cli("access", "--json"))
    assert answer["exports"] == [
        {"name": "disk", "rules": ["rw cert:alice", "ro uid:0"]}
    ]
    cli("access", "disk", "--clear")
    assert cli("access", "disk") == "disk: rw any\n"


def test_rules_follow_a_rename(cli: CommandLine) -> None:
    cli("access", "disk", "none any")
    cli("rename", "disk", "other")
    assert cli("access", "other") == "other: none any\n"


def test_rules_of_an_export_to_come(cli: CommandLine) -> None:
    said = in_process("access", "later", "none any")
    assert (said.returncode, said.stderr) == (
        0,
        "nbdtarget: access later: there is no such export; the rules hold for one that is made later\n",
    )
    assert cli("access", "later") == "later: none any\n"
    cli("create", "later", "--table", "0 8 zero")
    assert cli("access", "later") == "later: none any\n"


def test_one_export_as_json(cli: CommandLine) -> None:
    cli("create", "other", "--table", "0 8 zero")
    (export,) = json.loads(cli("access", "disk", "--json"))["exports"]
    assert export == {"name": "disk", "rules": None}


def test_device_may_be_named_by_its_path(cli: CommandLine) -> None:
    cli("access", "/dev/mapper/disk", "ro any")
    assert cli("access", "disk") == "disk: ro any\n"


def test_rule_that_is_none_changes_nothing(cli: CommandLine) -> None:
    said = cli("access", "disk", "rw alice", status=1)
    assert said.startswith("nbdtarget: access disk: ")
    assert "rule `rw alice': `alice' is none of" in said
    assert cli("access", "disk") == "disk: rw any\n"


def test_clear_takes_a_name_and_no_rules(cli: CommandLine) -> None:
    cli("access", "--clear", status=2)
    cli("access", "disk", "rw any", "--clear", status=2)
