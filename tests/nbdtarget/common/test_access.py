# SPDX-License-Identifier: Apache-2.0
"""Rules, without a server."""

import grp
import os
import pwd

import pytest

from nbdtarget.common.access import (
    RULES_MAX,
    Access,
    AccessRules,
    Identity,
    parse_rule,
    parse_rules,
)
from nbdtarget.common.errors import NbdTargetError

ALICE = Identity("192.0.2.7", is_encrypted=True, names=("alice", "alice.example.org"))
STRANGER = Identity("198.51.100.1")
LOCAL = Identity(uid=os.getuid(), gids=(os.getgid(), 4711))


@pytest.mark.parametrize(
    ("condition", "alice", "stranger", "local"),
    [
        ("any", True, True, True),
        ("tls", True, False, False),
        ("unix", False, False, True),
        ("cert:alice", True, False, False),
        ("cert:*.example.org", True, False, False),
        ("cert:ALICE", False, False, False),
        ("cert:*", True, False, False),
        ("net:192.0.2.0/24", True, False, False),
        ("net:198.51.100.1", False, True, False),
        ("net:0.0.0.0/0", True, True, False),
        ("net:::/0", False, False, False),
        (f"uid:{os.getuid()}", False, False, True),
        (f"uid:{pwd.getpwuid(os.getuid()).pw_name}", False, False, True),
        (f"gid:{grp.getgrgid(os.getgid()).gr_name}", False, False, True),
        ("gid:4711", False, False, True),
        ("uid:4711", False, False, False),
        ("cert:alice net:10.0.0.0/8", False, False, False),
        ("cert:alice net:192.0.2.0/24 tls", True, False, False),
    ],
)
def test_condition(condition: str, alice: bool, stranger: bool, local: bool) -> None:
    rule = parse_rule(f"rw {condition}")
    held = (rule.holds(ALICE), rule.holds(STRANGER), rule.holds(LOCAL))
    assert held == (alice, stranger, local)


def test_address_that_ipv6_wraps_is_that_of_ipv4() -> None:
    rule = parse_rule("rw net:192.0.2.0/24")
    assert rule.holds(Identity("::ffff:192.0.2.9"))
    assert parse_rule("rw net:fe80::/10").holds(Identity("fe80::1%eth0"))


def test_client_of_vsock_is_neither_unix_nor_a_network() -> None:
    vsock = Identity(cid=3)
    assert str(vsock) == "vsock:3"
    assert parse_rule("rw vsock:3").holds(vsock)
    assert not parse_rule("rw vsock:4").holds(vsock)
    assert parse_rule("rw vsock").holds(vsock)
    for other in (ALICE, LOCAL):
        assert not parse_rule("rw vsock").holds(other)
        assert not parse_rule("rw vsock:3").holds(other)
    assert not parse_rule("rw unix").holds(vsock)
    assert not parse_rule("rw net:0.0.0.0/0").holds(vsock)
    assert parse_rule("rw any").holds(vsock)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "begins with none of rw, ro and none"),
        ("write any", "begins with none of rw, ro and none"),
        ("rw", "says nothing about the client: write `rw any'"),
        ("rw alice", "`alice' is none of cert:GLOB"),
        ("rw cert:", "`cert:' is none of cert:GLOB"),
        ("rw any:x", "`any:x' is none of"),
        ("rw uid:no-such-user", "there is no user no-such-user"),
        ("rw gid:no-such-group", "there is no group no-such-group"),
        (f"rw uid:{'9' * 5000}", "there is no user 999"),
        (f"rw gid:{'9' * 5000}", "there is no group 999"),
        ("rw vsock:host", "host is not the number of a machine"),
        ("rw vsock:4294967295", "4294967295 is not the number of a machine"),
        ("rw net:192.0.2.1/24", "has host bits set"),
        ("rw net:localhost", "does not appear to be an IPv4 or IPv6 network"),
    ],
)
def test_rule_that_is_none_is_one_sentence(text: str, reason: str) -> None:
    with pytest.raises(NbdTargetError, match=reason) as caught:
        parse_rule(text)
    assert f"rule `{text}': " in str(caught.value)


def test_there_are_not_more_rules_than_the_bound() -> None:
    with pytest.raises(NbdTargetError, match="more than 1000 rules"):
        parse_rules(["rw any"] * (RULES_MAX + 1))


def test_first_rule_that_holds_decides_and_no_rule_is_no_access() -> None:
    rules = AccessRules(parse_rules(["none net:192.0.2.7", "ro cert:alice", "rw unix"]))
    assert rules.access("disk", ALICE) is Access.NONE
    assert rules.access("disk", Identity(names=("alice",))) is Access.READ
    assert rules.access("disk", LOCAL) is Access.WRITE
    assert rules.access("disk", STRANGER) is Access.NONE


def test_everybody_may_attach_where_nobody_has_written_a_rule() -> None:
    assert AccessRules().access("disk", STRANGER) is Access.WRITE


def test_empty_list_of_rules_keeps_everybody_out() -> None:
    assert AccessRules(()).access("disk", LOCAL) is Access.NONE
    rules = AccessRules(None, {"disk": ()})
    assert rules.access("disk", LOCAL) is Access.NONE
    assert rules.access("other", LOCAL) is Access.WRITE


def test_rules_of_a_command_win_over_the_file_and_the_file_over_the_default() -> None:
    rules = AccessRules(parse_rules(["none any"]), {"a": parse_rules(["ro any"])})
    rules.by_command["b"] = parse_rules(["rw any"])
    shown = [rules.access(name, ALICE) for name in ("a", "b", "c")]
    assert shown == [Access.READ, Access.WRITE, Access.NONE]
    rules.by_command["a"] = ()
    assert rules.access("a", ALICE) is Access.NONE


def test_export_with_another_name_keeps_its_rules() -> None:
    rules = AccessRules(None, {"secret": parse_rules(["rw uid:0"])})
    rules.renamed("secret", "public")
    assert rules.access("public", STRANGER) is Access.NONE
    # The file may be read again: it knows the old name only.
    rules.by_export = {}
    assert rules.access("public", STRANGER) is Access.NONE
    rules.renamed("free", "free2")
    assert rules.of("free2") is None


def test_export_without_rules_does_not_inherit_those_of_its_new_name() -> None:
    rules = AccessRules(None, {"b": parse_rules(["none any"])})
    rules.renamed("a", "b")
    assert rules.access("b", ALICE) is Access.NONE


def test_what_the_log_shows_is_what_a_rule_can_say() -> None:
    assert str(ALICE) == "cert:alice cert:alice.example.org net:192.0.2.7"
    assert str(Identity(uid=0, gids=(0,))) == "uid:0"
    assert str(Identity()) == "unknown"
    assert parse_rule("rw  cert:x").text == "rw cert:x"
    assert parse_rule("rw tls cert:x").wants_certificate
    assert not parse_rule("rw tls").wants_certificate


def test_rules_of_commands_move_to_another_process() -> None:
    rules = AccessRules(None, {"of the file": parse_rules(["ro any"])})
    rules.by_command["disk"] = parse_rules(["rw cert:alice", "none any"])
    rules.by_command["closed"] = ()
    other = AccessRules()
    rules.kept["gone"] = parse_rules(["ro any"])
    other.take_texts(*rules.texts())
    assert other.by_command == rules.by_command
    assert other.kept == rules.kept
    assert other.by_export == {}  # each process reads the file by itself
    assert other.access("gone", ALICE) is Access.READ
    assert other.access("closed", ALICE) is Access.NONE
    assert other.access("disk", STRANGER) is Access.NONE
