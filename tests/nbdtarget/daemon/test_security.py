# SPDX-License-Identifier: Apache-2.0
"""Certificates and rules of a whole process."""

import asyncio
import logging
import shutil
from pathlib import Path

import pytest

from nbdtarget.common.access import Access, Identity
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.config.file import parse
from nbdtarget.daemon import security as module
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.security import Security, SecurityOptions, security_of
from nbdtarget.server.tls import TlsOptions
from nbdtarget_protocol.handshake import TlsMode
from tests.support.certificates import authority, needs_openssl

PUBLIC = "tcp:0.0.0.0:1"
STRANGER = Identity("192.0.2.1")


def pki() -> str:
    return str(authority()[1])


def test_command_wins_over_the_file() -> None:
    config = parse(
        'access = ["none any"]\n[device.a]\naccess = ["ro any"]\n', "/x.toml", {}
    )
    of_command = SecurityOptions(access=("rw any",))
    for options, default in (
        (of_command, Access.WRITE),
        (SecurityOptions(), Access.NONE),
    ):
        rules = security_of(options, config).rules
        assert rules.access("other", STRANGER) is default
        assert rules.access("a", STRANGER) is Access.READ
    assert security_of(of_command, None).rules.access("x", STRANGER) is Access.WRITE


def test_reload_takes_the_rules_of_the_file_and_leaves_those_of_commands() -> None:
    security = Security()
    security.rules.by_command["c"] = ()
    security.set_rules(("none any",), {"a": ("ro any",)})
    shown = [security.rules.access(name, STRANGER) for name in "abc"]
    assert shown == [Access.READ, Access.NONE, Access.NONE]
    with pytest.raises(NbdTargetError, match="rule `x'"):
        security.set_rules(None, {"a": ("x",)})
    assert security.rules.access("a", STRANGER) is Access.READ


def test_device_that_leaves_the_file_and_is_served_on_keeps_its_rules() -> None:
    security = Security(None, None, None, {"a": ("none any",), "b": ("none any",)})
    security.set_rules(None, {}, keep={"a"})
    shown = [security.rules.access(name, STRANGER) for name in "ab"]
    assert shown == [Access.NONE, Access.WRITE]
    security.set_rules(None, {}, keep={"a"})  # the next reload
    assert security.rules.access("a", STRANGER) is Access.NONE
    security.set_rules(None, {"a": ("ro any",)}, keep={"a"})  # the file says more
    assert security.rules.access("a", STRANGER) is Access.READ
    security.set_rules(None, {})  # it is in the file again, without rules
    assert security.rules.access("a", STRANGER) is Access.WRITE


@needs_openssl
def test_socket_of_another_process_stays_as_it_was_there() -> None:
    """Its address may have gone from the file, and the file may say `tls = "off"` by now."""
    running = Security(SecurityOptions(TlsOptions(None, pki(), True))).tls.options
    security = Security(SecurityOptions(TlsOptions("off")))
    tls = security.taken_over(running)
    assert tls.mode is TlsMode.REQUIRE
    assert tls.verifies_peer
    assert tls.context is not None
    assert security.taken_over(running) is tls
    paths = {f"{pki()}/server-cert.pem", f"{pki()}/ca-cert.pem"}
    assert set(security.certificates()) == paths
    with pytest.raises(NbdTargetError, match="/nonexistent/"):
        security.taken_over(TlsOptions("require", "/nonexistent"))


@needs_openssl
def test_listeners_differ() -> None:
    security = Security(
        SecurityOptions(TlsOptions("require", pki())),
        {"unix:/s": TlsOptions("off"), PUBLIC: TlsOptions(None, None, True)},
    )
    assert security.of("unix:/other").mode is TlsMode.REQUIRE
    assert not security.of("unix:/other").verifies_peer
    assert security.of("unix:/s").mode is TlsMode.OFF
    assert security.of(PUBLIC).verifies_peer
    paths = {f"{pki()}/server-cert.pem", f"{pki()}/ca-cert.pem"}
    assert set(security.certificates()) == paths
    assert Security().certificates() == {}


@needs_openssl
@pytest.mark.parametrize(
    ("options", "words"),
    [
        (SecurityOptions(), "NBD without TLS"),
        (SecurityOptions(access=("rw any",)), "as the rules say"),
        (SecurityOptions(TlsOptions("require", "PKI")), "are not asked who they are"),
        (SecurityOptions(TlsOptions("require", "PKI", True)), ""),
        (SecurityOptions(TlsOptions("require", "PKI"), ("rw tls",)), ""),
        (SecurityOptions(TlsOptions("on", "PKI")), "TLS is offered, but clients are"),
        (SecurityOptions(TlsOptions("on", "PKI", True)), ""),
    ],
)
def test_open_door_is_warned_of_once(
    caplog: pytest.LogCaptureFixture, options: SecurityOptions, words: str
) -> None:
    tls = options.tls
    if tls.certificates is not None:
        tls = TlsOptions(tls.mode, pki(), tls.verify_peer)
    security = Security(options._replace(tls=tls))
    of_all = {PUBLIC: security.of(PUBLIC), "tcp:[::]:1": security.of("tcp:[::]:1")}
    security.warn_of_openness(of_all)
    said = [each.getMessage() for each in caplog.records]
    assert len(said) == bool(words)
    assert words in "".join(said)


@pytest.mark.parametrize(
    ("access", "words"),
    [(None, "each virtual machine of this host"), (("ro any",), "")],
)
def test_vsock_that_is_open_to_all_machines_is_warned_of(
    caplog: pytest.LogCaptureFixture, access: tuple[str, ...] | None, words: str
) -> None:
    security = Security(SecurityOptions(access=access))
    security.warn_of_openness({"vsock:any:1": security.tls})
    assert len(caplog.records) == bool(words)
    assert words in caplog.text


@needs_openssl
@pytest.mark.parametrize("mode", [None, "off"])
def test_verification_without_tls_is_refused(mode: str | None) -> None:
    """Otherwise its clients would be served in the clear, and not asked for a certificate."""
    pki_of = None if mode is None else pki()
    in_vain = TlsOptions(mode, pki_of, True)
    with pytest.raises(NbdTargetError, match="without TLS they show none"):
        Security(SecurityOptions(in_vain))
    with pytest.raises(NbdTargetError, match="without TLS they show none"):
        Security(SecurityOptions(), {PUBLIC: in_vain})
    with pytest.raises(NbdTargetError, match="without TLS they show none"):
        parse(
            f'listen = [{{address = "{PUBLIC}", tls_verify_peer = true}}]',
            "/x.toml",
            {},
        )


@needs_openssl
def test_verification_for_the_listeners_with_tls_is_no_mistake() -> None:
    text = (
        f'listen = ["unix:/s", {{address = "{PUBLIC}", tls = "require"}}]\n'
        f'tls = "off"\ntls_certificates = "{pki()}"\ntls_verify_peer = true\n'
    )
    security = security_of(SecurityOptions(), parse(text, "/x.toml", {}))
    assert security.of(PUBLIC).verifies_peer
    assert security.of("unix:/s").mode is TlsMode.OFF
    # The command line may have what the file lacks.
    options = SecurityOptions(TlsOptions(None, pki()))
    half = parse("tls_verify_peer = true", "/x.toml", {})
    assert security_of(options, half).tls.verifies_peer


def test_rule_that_can_hold_for_nobody_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    Security(SecurityOptions(access=("rw cert:alice",)))
    assert "match no client" in caplog.text


@needs_openssl
def test_reload_with_a_broken_certificate_keeps_the_old_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = Path(shutil.copytree(authority()[1], tmp_path / "pki"))
    security = Security(SecurityOptions(TlsOptions("on", str(directory))))
    old = security.tls.context
    security.reload()
    assert security.tls.context is not old
    kept = security.tls.context
    (directory / "server-cert.pem").write_text("")
    security.reload()
    assert security.tls.context is kept
    assert "certificates not reloaded" in caplog.text


@needs_openssl
def test_one_broken_certificate_leaves_the_others_to_be_renewed(
    tmp_path: Path,
) -> None:
    names = ["first", "broken", "last"]
    folders = [shutil.copytree(authority()[1], tmp_path / name) for name in names]
    listeners = {
        name: TlsOptions("on", str(folder))
        for name, folder in zip(names, folders, strict=True)
    }
    security = Security(listeners=listeners)
    old = [security.of(name).context for name in names]
    (tmp_path / "broken/server-cert.pem").write_text("")
    assert not security.reload()
    new = [security.of(name).context for name in names]
    is_kept = [now is before for now, before in zip(new, old, strict=True)]
    assert is_kept == [False, True, False]


@needs_openssl
def test_files_that_listeners_share_are_complained_of_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    authority()[0].issue(tmp_path, "server", "x", days=3)
    options = TlsOptions("require", str(tmp_path))
    listeners = {"a": TlsOptions("on"), "b": TlsOptions("on"), "c": TlsOptions()}
    security = Security(SecurityOptions(options), listeners)
    assert caplog.text.count("expires in") == 1
    assert (
        "server-cert.pem: expires in 2 days (x); then clients refuse it" in caplog.text
    )
    assert security.of("a") is security.of("b")
    caplog.clear()
    assert security.reload()
    assert len(caplog.records) == 1
    (tmp_path / "server-cert.pem").write_text("")
    caplog.clear()
    assert not security.reload()
    assert caplog.text.count("certificates not reloaded") == 1


@needs_openssl
def test_certificates_of_disks_are_watched_too(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    own, pki_of_all = authority()
    own.issue(tmp_path, "client", "bob", days=3)
    own.withdraw(pki_of_all / "client-cert.pem", tmp_path / "ca-crl.pem", days=-1)
    security = Security()
    assert security.certificates() == {}
    uri = f"nbds://host/d?tls-certificates={tmp_path}"
    security.disks = lambda: [
        "/srv/a.img",
        "nbds-of-old.img",
        uri,
        f"{uri}&connections=1",
    ]
    assert set(security.certificates()) == {
        f"{tmp_path}/{name}.pem" for name in ("ca-cert", "ca-crl", "client-cert")
    }
    assert not security.has_certificates
    security.warn_of_expiry()
    assert (
        "client-cert.pem: expires in 2 days (bob); then servers refuse it"
        in caplog.text
    )
    assert "ca-crl.pem: has expired (test-authority): all certificates" in caplog.text
    # A file is read again when it has changed.
    old_end_s = security.certificates()[f"{tmp_path}/client-cert.pem"]
    own.issue(tmp_path, "client", "bob", days=9)
    assert security.certificates()[f"{tmp_path}/client-cert.pem"] > old_end_s
    (tmp_path / "ca-crl.pem").write_text("garbage")
    caplog.clear()
    for _ in range(3):
        assert f"{tmp_path}/ca-crl.pem" not in security.certificates()
    assert caplog.text.count("it is not known until when this is valid") == 1
    security.disks = lambda: [f"{uri}&tls-verify-peer=false"]
    assert set(security.certificates()) == {f"{tmp_path}/client-cert.pem"}


@needs_openssl
async def test_reading_the_file_again_renews_certificates(tmp_path: Path) -> None:
    directory = shutil.copytree(authority()[1], tmp_path / "pki")
    options = SecurityOptions(TlsOptions("on", str(directory)))
    daemon = Daemon(security=Security(options))
    old = daemon.security.tls.context
    daemon.follow_rules(parse("", "/x.toml", {}))
    assert daemon.security.tls.context is not old
    await daemon.close(has_served=False)


@needs_openssl
async def test_expiry_is_looked_at_again_and_again(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    async def next_turn(_: float) -> None:
        await asyncio.sleep(0)

    monkeypatch.setattr(module, "sleep", next_turn)
    authority()[0].issue(tmp_path, "server", "x", days=3)
    security = Security(SecurityOptions(TlsOptions("on", str(tmp_path))))
    caplog.clear()
    task = security.start_watching()
    for _ in range(6):
        await asyncio.sleep(0)
    task.cancel()
    assert "expires in" in caplog.text


async def test_daemon_follows_the_rules_of_its_file(
    caplog: pytest.LogCaptureFixture,
) -> None:
    caplog.set_level(logging.WARNING)
    daemon = Daemon()
    daemon.follow_rules(parse('access = ["none any"]', "/x.toml", {}))
    assert daemon.security.rules.access("a", STRANGER) is Access.NONE
    await daemon.close(has_served=False)


@needs_openssl
async def test_look_at_the_expiry_that_fails_is_logged_and_tried_again(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def next_turn(_: float) -> None:
        await asyncio.sleep(0)

    def fail() -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr(module, "sleep", next_turn)
    options = SecurityOptions(TlsOptions("on", str(authority()[1])))
    security = Security(options)
    monkeypatch.setattr(security, "warn_of_expiry", fail)
    task = security.start_watching()
    for _ in range(6):
        await asyncio.sleep(0)
    task.cancel()
    assert caplog.text.count("it was not looked whether certificates expire") > 1
    assert "a bug" in caplog.text
