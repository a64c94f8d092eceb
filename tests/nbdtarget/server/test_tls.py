# SPDX-License-Identifier: Apache-2.0
"""TLS of a listener. Each fault that other servers had is a test with its name."""

import asyncio
import contextlib
import logging
import os
import shutil
import ssl
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.common.tls_context import client_context
from nbdtarget.common.tls_socket import TlsError, TlsSocket
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import ListenerTls, TlsOptions
from nbdtarget_protocol import consts as c
from nbdtarget_protocol.handshake import TlsMode
from tests.support.certificates import Authority, authority, needs_openssl
from tests.support.clock import SimClock
from tests.support.patience import until
from tests.support.peer import MIB, Peer, Served

pytestmark = needs_openssl

STARTTLS = c.OPTION.pack(c.IHAVEOPT, c.OPT_STARTTLS, 0)

Attach = Callable[..., Awaitable[Peer]]


def options(mode: str = "require", *, verify_peer: bool = False) -> TlsOptions:
    return TlsOptions(mode, str(authority()[1]), verify_peer)


async def started(served: Served, tls: TlsOptions) -> Listener:
    served.listener = Listener(
        served.directory,
        limits=served.limits,
        clock=served.clock,
        tls=ListenerTls(tls),
    )
    await served.listener.start(f"unix:{served.path}")
    return served.listener


async def acknowledged(served: Served) -> Peer:
    """A client whose STARTTLS is acknowledged."""
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_STARTTLS)
    assert await peer.option_reply() == (c.REP_ACK, b"")
    return peer


async def encrypt(peer: Peer, context: ssl.SSLContext | None = None) -> None:
    context = context or client_context(str(authority()[1]))
    await peer.writer.start_tls(context, server_hostname="localhost")


async def encrypted(served: Served, context: ssl.SSLContext | None = None) -> Peer:
    """A client in TLS that has negotiated nothing yet."""
    peer = await acknowledged(served)
    await encrypt(peer, context)
    return peer


async def attach(peer: Peer, *, structured: bool = False) -> None:
    """Attach, behind the greeting."""
    if structured:
        peer.option(c.OPT_STRUCTURED_REPLY)
        assert await peer.option_reply() == (c.REP_ACK, b"")
        peer.structured = True
    peer.option(c.OPT_GO, bytes(6))
    while (await peer.option_reply())[0] != c.REP_ACK:
        pass


# ---- it works ----


@pytest.mark.parametrize("mode", ["on", "require"])
async def test_requests_of_all_sizes_through_tls(served: Served, mode: str) -> None:
    await started(served, options(mode))
    peer = await encrypted(served)
    await attach(peer, structured=True)
    for size in (1, 4096, 20_000, 100_000, MIB):
        data = (bytes(range(1, 252)) * (size // 251 + 1))[:size]
        assert (await peer.ask(c.CMD_WRITE, 0, payload=data)).error == 0
        assert (await peer.ask(c.CMD_READ, 0, size)).data == data


async def test_many_requests_in_one_record_are_all_answered(served: Served) -> None:
    await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    requests = [peer.request(c.CMD_READ, nr * 512, 512) for nr in range(500)]
    peer.writer.write(b"".join(requests))
    cookies = {(await peer.reply()).cookie for _ in requests}
    assert len(cookies) == len(requests)


async def test_requests_behind_go_in_one_record_are_answered(served: Served) -> None:
    await started(served, options())
    peer = await encrypted(served)
    go = c.OPTION.pack(c.IHAVEOPT, c.OPT_GO, 6) + bytes(6)
    requests = [peer.request(c.CMD_READ, 0, 4096) for _ in range(300)]
    peer.writer.write(go + b"".join(requests))
    while (await peer.option_reply())[0] != c.REP_ACK:
        pass
    for _ in requests:
        assert (await peer.reply()).error == 0


async def test_client_that_reads_late_gets_every_reply(served: Served) -> None:
    """The socket is full in between, and the connection is paused."""
    served.limits = Limits(
        poison_borrowed=True, socket_buffer=16 << 10, bytes_in_flight_max=MIB
    )
    await started(served, options())
    served.disk.data[:] = bytes(range(256)) * (MIB // 256)
    peer = await encrypted(served)
    await attach(peer)
    requests = [peer.request(c.CMD_READ, 4096, 256 << 10) for _ in range(40)]
    peer.writer.write(b"".join(requests))
    for _ in requests:
        assert (await peer.reply()).data == served.disk.data[4096 : 4096 + (256 << 10)]


async def test_writes_of_a_paused_client_go_on(served: Served) -> None:
    served.limits = Limits(poison_borrowed=True, requests_in_flight_max=2)
    await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    served.disk.hold = True
    data = bytes(range(256)) * 256
    for at in range(8):
        peer.send(c.CMD_WRITE, at * len(data), payload=data)
    await served.disk.until_held(2)
    served.disk.hold = False
    served.disk.let_go()
    for _ in range(8):
        assert (await peer.reply()).error == 0
    assert served.disk.data[: 8 * len(data)] == data * 8


async def test_disc_ends_with_close_notify(served: Served) -> None:
    listener = await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    peer.send(c.CMD_FLUSH)
    peer.send(c.CMD_DISC)
    assert (await peer.reply()).error == 0
    assert await peer.at_end()
    await served.until_connections(0)
    assert listener.nr_connections == 0


async def test_shutdown_ends_with_close_notify(served: Served) -> None:
    listener = await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    closing = asyncio.create_task(listener.close())
    assert await peer.at_end()
    peer.close()
    await closing


async def test_truncation_behind_half_a_write_carries_nothing_out(
    served: Served,
) -> None:
    await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    peer.writer.write(peer.request(c.CMD_WRITE, 0, payload=b"x" * 1000)[:500])
    await peer.writer.drain()
    peer.writer.transport.abort()
    await served.until_connections(0)
    assert served.disk.bios == []


# ---- what others got wrong ----


async def test_plaintext_sent_together_with_starttls_is_not_carried_over(
    served: Served,
) -> None:
    await started(served, options("on"))
    peer = await served.connect()
    await peer.greet()
    go = c.OPTION.pack(c.IHAVEOPT, c.OPT_GO, 6) + bytes(6)
    peer.writer.write(STARTTLS + go)
    assert await peer.at_end()
    assert served.directory.nr_open["disk"] == 0


async def test_plaintext_behind_the_acknowledgement_is_not_an_option(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    await started(served, options("on"))
    peer = await acknowledged(served)
    peer.option(c.OPT_GO, bytes(6))
    answer = await peer.reader.read()
    assert b"\0\x03\xe8\x89\x04Ue\xa9" not in answer  # no option is answered
    await served.until_connections(0)
    assert "what came is not TLS" in caplog.text


async def test_only_starttls_is_answered_where_tls_is_required(served: Served) -> None:
    await started(served, options("require"))
    peer = await served.connect()
    await peer.greet()
    for option in (c.OPT_LIST, c.OPT_GO, c.OPT_STRUCTURED_REPLY, 99):
        peer.option(option)
        assert (await peer.option_reply())[0] == c.REP_ERR_TLS_REQD
    peer.option(c.OPT_EXPORT_NAME, b"disk")
    assert await peer.at_end()


async def test_options_after_a_failed_handshake_are_not_answered(
    served: Served,
) -> None:
    await started(served, options("on", verify_peer=True))
    peer = await acknowledged(served)
    # In TLS 1.3 the client believes that all is well until it reads.
    await encrypt(peer, bare_context())
    peer.option(c.OPT_GO, bytes(6))
    with pytest.raises((ssl.SSLError, asyncio.IncompleteReadError, ConnectionError)):
        await peer.option_reply()
    await served.until_connections(0)


def bare_context() -> ssl.SSLContext:
    """A client that trusts our certificate and has none."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(str(authority()[1] / "ca-cert.pem"))
    return context


async def refused_in_tls(served: Served, caplog: pytest.LogCaptureFixture) -> TlsSocket:
    """A client that believes that all is well, although the server has refused it."""
    caplog.set_level(logging.INFO)
    await started(served, options("on", verify_peer=True))
    peer = await acknowledged(served)
    sock = peer.writer.get_extra_info("socket").dup()
    peer.writer.transport.pause_reading()  # type: ignore[attr-defined]  # it is a transport that reads, too
    asking = TlsSocket(
        sock, bare_context(), server_side=False, server_hostname="localhost"
    )
    await until(asking.handshake)
    await until(lambda: "the peer showed no certificate" in caplog.text)
    peer.writer.transport.abort()  # the connection goes on, in the duplicate
    return asking


async def test_refused_client_learns_why_though_it_sends_its_option_late(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """In TLS 1.3 its first option follows the handshake. If the connection is closed by then, it is told of a reset."""
    with contextlib.closing(await refused_in_tls(served, caplog)) as asking:
        asking.send(c.OPTION.pack(c.IHAVEOPT, c.OPT_GO, 6) + bytes(6))
        with pytest.raises(TlsError, match="requires a certificate"):
            await until(lambda: bool(received(asking)))
    await served.until_connections(0)


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
@pytest.mark.parametrize(
    ("whose", "reason"),
    [
        ("mallory", "unable to get local issuer certificate"),
        ("late", "certificate has expired"),
        ("withdrawn", "certificate revoked"),
    ],
)
async def test_certificate_that_is_refused_is_logged_with_its_name(
    served: Served,
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    whose: str,
    reason: str,
    version: str,
) -> None:
    own, pki = authority()
    trusted = Path(shutil.copytree(pki, tmp_path / "pki"))
    issuer = Authority(tmp_path, "another") if whose == "mallory" else own
    issuer.issue(tmp_path / "c", "client", whose, days=-1 if whose == "late" else 9)
    shutil.copy(pki / "ca-cert.pem", tmp_path / "c/ca-cert.pem")
    if whose == "withdrawn":
        own.withdraw(tmp_path / "c/client-cert.pem", trusted / "ca-crl.pem")
    listener = await started(served, TlsOptions("require", str(trusted), True))
    context = client_context(str(tmp_path / "c"))
    context.maximum_version = ssl.TLSVersion[version]
    peer = await acknowledged(served)
    with contextlib.suppress(OSError):
        await encrypt(peer, context)
    await until(lambda: listener.refusals.counts["certificate"] == 1)
    (said,) = [each for each in caplog.records if "TLS" in each.getMessage()]
    assert said.levelno == logging.WARNING
    assert f"(uid:{os.getuid()})" in said.getMessage()
    assert f"is not accepted: {reason} (the name in it: {whose})" in said.getMessage()


async def test_client_without_the_tls_that_is_required_is_logged_and_counted_once(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    listener = await started(served, options("require"))
    peer = await served.connect()
    await peer.greet()
    for option in (c.OPT_STRUCTURED_REPLY, c.OPT_LIST):
        peer.option(option)
        assert (await peer.option_reply())[0] == c.REP_ERR_TLS_REQD
    peer.writer.close()
    await served.until_connections(0)
    assert listener.refusals.counts["no_tls"] == 1
    (said,) = caplog.messages
    assert "does not use TLS, which is required here" in said
    # One that asks for TLS after such an answer is not refused.
    good = await served.connect()
    await good.greet()
    good.option(c.OPT_LIST)
    assert (await good.option_reply())[0] == c.REP_ERR_TLS_REQD
    good.option(c.OPT_STARTTLS)
    assert (await good.option_reply())[0] == c.REP_ACK
    await encrypt(good)
    await attach(good)
    good.writer.close()
    await served.until_connections(0)
    assert listener.refusals.counts["no_tls"] == 1


async def test_client_without_a_certificate_is_logged_and_counted(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(await refused_in_tls(served, caplog)):
        listener = await served.start()
        assert listener.refusals.counts["no_certificate"] == 1
        (said,) = [each for each in caplog.records if "showed no" in each.getMessage()]
        assert said.levelno == logging.WARNING


async def test_refused_client_that_stays_is_closed(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    served.clock = clock = SimClock()
    with contextlib.closing(await refused_in_tls(served, caplog)):
        assert (await served.start()).nr_connections == 1
        clock.advance(served.limits.linger_s)
        await served.until_connections(0)


async def refused(served: Served, caplog: pytest.LogCaptureFixture) -> Peer:
    """A client that has sent no TLS, and whose connection waits for it to go."""
    nr_before = caplog.text.count("TLS")
    peer = await acknowledged(served)
    peer.writer.write(b"this is no TLS at all" * 4)
    await until(lambda: caplog.text.count("TLS") > nr_before)
    return peer


async def test_refused_clients_that_stay_do_not_keep_others_out(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    served.clock = SimClock()
    served.limits = Limits(handshakes_max=2, connections_max=4)
    listener = await started(served, options("on"))
    for _ in range(6):
        await refused(served, caplog)
    assert listener.nr_connections == 2
    assert "handshakes_max" in caplog.text
    good = await encrypted(served)
    await attach(good)
    assert (await good.ask(c.CMD_READ, 0, 512)).error == 0


async def test_refused_client_makes_room_before_one_that_is_in_its_handshake(
    served: Served, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    served.clock = SimClock()
    served.limits = Limits(handshakes_max=2)
    await started(served, options("on"))
    slow = await acknowledged(served)
    for _ in range(4):
        await refused(served, caplog)
    await encrypt(slow)
    await attach(slow)
    assert (await slow.ask(c.CMD_READ, 0, 512)).error == 0


def received(sock: TlsSocket) -> bytes:
    with contextlib.suppress(BlockingIOError):
        return sock.recv(100)
    return b""


async def test_slow_tls_handshake_costs_its_own_connection(served: Served) -> None:
    served.clock = clock = SimClock()
    await started(served, options())
    slow = await acknowledged(served)
    slow.writer.write(b"\x16\x03\x01\x02\x00")  # a ClientHello of 512 bytes is to come
    good = await encrypted(served)
    await attach(good)
    # It has the whole time once more, because STARTTLS was an option.
    clock.advance(2 * served.limits.handshake_timeout_s)
    assert await slow.at_end()
    assert (await good.ask(c.CMD_READ, 0, 512)).error == 0


async def test_structured_replies_from_before_starttls_do_not_hold(
    served: Served,
) -> None:
    await started(served, options("on"))
    peer = await served.connect()
    await peer.greet()
    peer.option(c.OPT_STRUCTURED_REPLY)
    assert (await peer.option_reply())[0] == c.REP_ACK
    peer.option(c.OPT_STARTTLS)
    assert (await peer.option_reply())[0] == c.REP_ACK
    await encrypt(peer)
    await attach(peer)
    assert not peer.structured
    assert (await peer.ask(c.CMD_READ, 0, 512)).chunks == ()


# ---- options, files ----


def test_uri_says_nbds_where_tls_is_required(tmp_path: Path) -> None:
    async def patterns(mode: str) -> list[str]:
        listener = Listener(Served(tmp_path).directory, tls=ListenerTls(options(mode)))
        try:
            return await listener.start(f"unix:{tmp_path / mode}")
        finally:
            await listener.close()

    assert asyncio.run(patterns("require"))[0].startswith("nbds+unix:///")
    assert asyncio.run(patterns("on"))[0].startswith("nbd+unix:///")


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (TlsOptions("yes", "pki"), "none of off, on and require"),
        (TlsOptions("on"), "needs the directory of the certificates"),
        (TlsOptions("on", "pki", psk="keys"), "not both"),
        (TlsOptions("on", None, True, "keys"), "no certificate to verify"),
        (TlsOptions("on", "/nowhere"), "/nowhere/server-cert.pem: No such file"),
    ],
)
def test_wrong_options_are_one_sentence(wrong: TlsOptions, reason: str) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        ListenerTls(wrong)


def test_keys_without_a_mode_require_tls() -> None:
    assert TlsOptions(certificates="pki").tls_mode is TlsMode.REQUIRE
    assert TlsOptions(psk="keys").tls_mode is TlsMode.REQUIRE
    assert TlsOptions().tls_mode is TlsMode.OFF


def test_options_of_the_command_win_over_those_of_the_file() -> None:
    of_file = TlsOptions("require", "pki", True)
    assert TlsOptions().or_else(of_file) == of_file
    assert TlsOptions("on").or_else(of_file) == TlsOptions("on", "pki", True)
    keys = TlsOptions(psk="keys").or_else(TlsOptions("require", "pki"))
    assert keys == TlsOptions("require", None, None, "keys")


def test_reload_takes_new_files_and_keeps_the_old_ones_if_they_are_wrong(
    tmp_path: Path,
) -> None:
    pki = tmp_path / "pki"
    shutil.copytree(authority()[1], pki)
    tls = ListenerTls(TlsOptions("on", str(pki)))
    path = str(pki / "server-cert.pem")
    old, old_end_s = tls.context, tls.ends[path].expires_s
    authority()[0].issue(pki, "server", "server.example", "DNS:localhost", days=25)
    tls.reload()
    new = tls.context
    assert new is not old
    new_end = tls.ends[path]
    assert new_end.expires_s > old_end_s + 4 * 86_400
    (pki / "server-key.pem").write_bytes((pki / "client-key.pem").read_bytes())
    with pytest.raises(NbdTargetError, match="is not the key of"):
        tls.reload()
    assert tls.context is new
    assert tls.ends[path] is new_end


def test_files_whose_end_counts_are_those_that_are_used(tmp_path: Path) -> None:
    own, pki = authority()
    directory = Path(shutil.copytree(pki, tmp_path / "pki"))
    assert ListenerTls(TlsOptions()).ends == {}

    def names(*, verify_peer: bool) -> list[str]:
        tls = ListenerTls(TlsOptions("on", str(directory), verify_peer))
        return [Path(path).name for path in tls.ends]

    assert names(verify_peer=False) == ["server-cert.pem"]
    assert names(verify_peer=True) == ["server-cert.pem", "ca-cert.pem"]
    own.withdraw(pki / "client-cert.pem", directory / "ca-crl.pem")
    assert names(verify_peer=True) == ["server-cert.pem", "ca-cert.pem", "ca-crl.pem"]


# ---- to another process ----


async def test_a_client_notices_a_hand_over_only_when_it_has_succeeded(
    served: Served,
) -> None:
    """Encryption cannot be moved. If the other process does not take over, the client stays."""
    listener = await started(served, options())
    peer = await encrypted(served)
    await attach(peer)
    await peer.ask(c.CMD_WRITE, 0, payload=b"t" * 512)
    assert await listener.freeze(5) == []
    assert listener.moved_state()[0].connections == ()
    cookie = peer.send(c.CMD_READ, 0, 512)
    await asyncio.sleep(0.01)
    listener.thaw()
    reply = await peer.reply()
    assert (reply.cookie, reply.error, reply.data) == (cookie, 0, b"t" * 512)
    assert await listener.freeze(5) == []
    listener.moved_state()
    peer.send(c.CMD_READ, 0, 512)  # it is not refused: the client sends it again
    listener.forget()
    assert await peer.at_end()
