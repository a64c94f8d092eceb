# SPDX-License-Identifier: Apache-2.0
"""The rules of which client may attach to which export, seen by a client."""

import logging
import os
import ssl

import pytest

from nbdtarget.common.access import AccessRules, parse_rules
from nbdtarget.common.tls_context import client_context
from nbdtarget.server.export import DirectoryExports
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.errors import OptionError
from nbdtarget_protocol.options import encode_info_request
from tests.support.certificates import authority, needs_openssl
from tests.support.peer import Directory, Disk, Peer, Served

ME = f"uid:{os.getuid()}"


async def started(
    served: Served, rules: AccessRules, tls: TlsOptions | None = None
) -> None:
    served.directory.devices["other"] = Disk()
    served.directory.nr_open["other"] = 0
    served.listener = Listener(
        served.directory,
        limits=served.limits,
        tls=ListenerTls(tls or TlsOptions()),
        rules=rules,
    )
    await served.listener.start(f"unix:{served.path}")


async def listed(peer: Peer) -> list[bytes]:
    peer.option(c.OPT_LIST)
    names = []
    while (reply := await peer.option_reply())[0] == c.REP_SERVER:
        length = int.from_bytes(reply[1][:4], "big")
        names.append(reply[1][4 : 4 + length])
    assert reply[0] == c.REP_ACK
    return names


async def refusal(peer: Peer, name: str) -> tuple[int, bytes]:
    peer.option(c.OPT_GO, encode_info_request(name, []))
    return await peer.option_reply()


async def test_export_that_a_client_may_not_attach_does_not_exist_for_it(
    served: Served,
) -> None:
    await started(served, AccessRules(None, {"disk": parse_rules(["rw uid:99999"])}))
    peer = await served.connect()
    await peer.greet()
    assert await listed(peer) == [b"other"]
    kind, message = await refusal(peer, "disk")
    assert kind == c.REP_ERR_UNKNOWN
    unknown = await refusal(peer, "none")
    assert unknown == (kind, message.replace(b"'disk'", b"'none'"))
    peer.option(c.OPT_EXPORT_NAME, b"disk")
    assert await peer.at_end()


async def test_user_that_is_named_may_attach(served: Served) -> None:
    await started(served, AccessRules(None, {"disk": parse_rules([f"rw {ME}"])}))
    peer = await served.attach("disk")
    assert (await peer.ask(c.CMD_WRITE, 0, payload=b"x")).error == 0


async def test_client_that_may_only_read_is_told_so_and_cannot_write(
    served: Served,
) -> None:
    await started(served, AccessRules(None, {"disk": parse_rules([f"ro {ME}"])}))
    peer = await served.attach("disk")
    assert peer.flags & c.FLAG_READ_ONLY
    assert not peer.flags & (c.FLAG_SEND_TRIM | c.FLAG_SEND_WRITE_ZEROES)
    for command in (c.CMD_WRITE, c.CMD_WRITE_ZEROES, c.CMD_TRIM):
        payload = b"x" * 512 if command == c.CMD_WRITE else b""
        assert (await peer.ask(command, 0, 512, payload=payload)).error == c.EPERM
    assert (await peer.ask(c.CMD_READ, 0, 512)).error == 0
    assert {op for op, *_ in served.disk.bios} == {0}


async def test_rules_that_change_hold_for_new_connections(served: Served) -> None:
    rules = AccessRules()
    await started(served, rules)
    old = await served.attach("disk")
    rules.by_export = {"disk": ()}
    assert (await old.ask(c.CMD_READ, 0, 512)).error == 0
    new = await served.connect()
    await new.greet()
    assert (await refusal(new, "disk"))[0] == c.REP_ERR_UNKNOWN


async def test_refused_client_is_logged_once_with_what_it_showed(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    await started(served, AccessRules(()))
    peer = await served.connect()
    await peer.greet()
    for name in ("disk", "disk", "no such name"):
        assert (await refusal(peer, name))[0] == c.REP_ERR_UNKNOWN
    assert await listed(peer) == []
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert f"({ME}): may not attach disk" in said[0]


def test_default_export_that_may_not_be_attached_does_not_exist() -> None:
    directory = Directory({"disk": Disk()})
    hidden = DirectoryExports(directory, rules=AccessRules(()))
    assert hidden.lookup("") is None
    assert DirectoryExports(directory).lookup("") is not None


def test_default_export_is_the_only_one_that_this_client_may_attach(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """What else there is does not show in the answer."""
    rules = AccessRules(None, {"hidden": (), "gone": ()})
    alone = DirectoryExports(Directory({"disk": Disk()}), rules=rules)
    directory = Directory({"disk": Disk(), "hidden": Disk()})
    directory.missing["gone"] = "its file is gone"
    beside = DirectoryExports(directory, rules=rules)
    for each in (alone, beside):
        found = each.lookup("")
        assert found is not None
        assert found.name == "disk"
    without_any = DirectoryExports(Directory({}), rules=rules)
    hidden_only = DirectoryExports(Directory({"hidden": Disk()}), rules=rules)
    assert without_any.lookup("") is hidden_only.lookup("") is None
    assert "may not attach the default export: no rule allows it" in caplog.text
    assert len(caplog.records) == 1


def test_default_export_is_no_other_disk_while_one_is_missing() -> None:
    directory = Directory({"disk": Disk()})
    directory.missing["gone"] = "its file is gone"
    assert DirectoryExports(directory).lookup("") is None
    del directory.devices["disk"]
    with pytest.raises(OptionError, match="its file is gone"):
        DirectoryExports(directory).lookup("")


def test_why_an_export_is_missing_is_not_told_to_everybody() -> None:
    directory = Directory({})
    directory.missing["disk"] = "its file is gone"
    assert DirectoryExports(directory, rules=AccessRules(())).lookup("disk") is None


@needs_openssl
async def test_names_of_the_certificate_count_after_tls(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    pki = str(authority()[1])
    rules = {
        "disk": parse_rules(["rw cert:alice.example"]),
        "other": parse_rules(["rw cert:bob"]),
    }
    await started(served, AccessRules(None, rules), TlsOptions("on", pki, True))
    peer = await served.connect()
    await peer.greet()
    assert await listed(peer) == []
    await _encrypt(peer, client_context(pki))
    assert await listed(peer) == [b"disk"]
    assert (await refusal(peer, "other"))[0] == c.REP_ERR_UNKNOWN
    assert "cert:alice " in caplog.text
    assert "may not attach other" in caplog.text
    assert served.listener is not None
    assert served.listener.refusals.counts["rules"] == 1
    peer.option(c.OPT_GO, encode_info_request("disk", []))
    assert (await peer.option_reply())[0] == c.REP_INFO


@needs_openssl
async def test_client_without_tls_shows_no_certificate(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """TLS is offered, and certificates are verified: without one only rules let a client in."""
    pki = str(authority()[1])
    rules = {"other": parse_rules(["ro any"]), "hidden": parse_rules(["none any"])}
    await started(served, AccessRules(None, rules), TlsOptions("on", pki, True))
    peer = await served.connect()
    await peer.greet()
    assert await listed(peer) == [b"other"]
    for name in ("disk", "hidden", "no such name"):
        code, said = await refusal(peer, name)
        assert (code, said) == (
            c.REP_ERR_TLS_REQD,
            b"a certificate is asked for: use TLS",
        )
    assert "may not attach disk: it has shown no certificate" in caplog.text
    peer.option(c.OPT_GO, encode_info_request("other", []))
    assert (await peer.option_reply())[0] == c.REP_INFO
    encrypted = await served.connect()
    await encrypted.greet()
    await _encrypt(encrypted, client_context(pki))
    assert await listed(encrypted) == [b"disk", b"other"]
    assert (await refusal(encrypted, "no such name"))[0] == c.REP_ERR_UNKNOWN


async def _encrypt(peer: Peer, context: ssl.SSLContext) -> None:
    peer.option(c.OPT_STARTTLS)
    assert await peer.option_reply() == (c.REP_ACK, b"")
    await peer.writer.start_tls(context, server_hostname="localhost")
