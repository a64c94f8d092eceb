# SPDX-License-Identifier: Apache-2.0
"""One server process follows signals in order. How it starts: test_serve; how it ends: test_stop."""

import asyncio
import os
import signal
import socket
from pathlib import Path
from typing import cast

import msgspec
import pytest

from nbdtarget.common.access import Access, Identity, parse_rules
from nbdtarget.config.file import parse
from nbdtarget.control.tokens import ControlTokens
from nbdtarget.daemon import daemon as daemon_module
from nbdtarget.daemon.daemon import Daemon
from nbdtarget.daemon.handover.messages import Moved
from nbdtarget.daemon.handover.taker import Offer
from nbdtarget.daemon.metrics_options import MetricsOptions
from nbdtarget.daemon.process import forget_what_hangs
from nbdtarget.daemon.security import Security, SecurityOptions
from nbdtarget.server.limits import Limits
from nbdtarget.server.listener import Listener
from nbdtarget.server.tls import TlsOptions
from tests.support.certificates import authority, needs_openssl


async def test_reloads_wait_for_the_start_and_for_each_other() -> None:
    server = Daemon()
    server.catch_signals(sighup_reloads=True)
    loop = asyncio.get_running_loop()
    came = asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, came.set)

    async def send_many() -> None:
        for _ in range(100):
            os.kill(os.getpid(), signal.SIGHUP)
        came.clear()
        os.kill(os.getpid(), signal.SIGUSR1)
        await came.wait()

    try:
        await send_many()
        assert not server.stop.is_set()
        begun: asyncio.Queue[None] = asyncio.Queue()
        gate = asyncio.Semaphore(0)

        async def reload() -> None:
            begun.put_nowait(None)
            await gate.acquire()
            raise ValueError("what reload did not expect")

        server.follow_reloads(reload)
        await begun.get()
        await send_many()
        gate.release()
        await begun.get()
        gate.release()
        await send_many()
        await begun.get()
        assert begun.empty()
    finally:
        loop.remove_signal_handler(signal.SIGUSR1)
        server.release_signals()
        await server.close()


async def test_job_is_told_when_a_hand_over_has_failed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The devices were opened again, so what it had set on them is gone. Clients do not go on before it is set anew."""
    server = Daemon()
    told: list[str] = []
    server.reopened = lambda: told.append("the job")
    monkeypatch.setattr(Listener, "thaw", lambda _: told.append("clients"))
    assert await server.freeze(5) == []
    await server.thaw()
    assert told == ["the job", "clients"]
    await server.close()


class Given:
    """An offer of a server in this process: what `old` hands over."""

    def __init__(self, old: Daemon) -> None:
        self._old = old

    async def receive(self) -> tuple[Moved, list[int]]:
        moved, fds = self._old.moved(self._old.parking())
        raw = msgspec.msgpack.encode(moved)
        return msgspec.msgpack.decode(raw, type=Moved), [os.dup(fd) for fd in fds]

    async def prepared(self) -> None:
        self._old.has_handed_over = True


@needs_openssl
async def test_new_process_protects_what_it_takes_over_as_the_old_one_did(
    tmp_path: Path,
) -> None:
    """The options of the old process count. The new one has read the configuration file, which may have changed."""
    tls = SecurityOptions(TlsOptions("require", str(authority()[1]), True))
    tokens = ControlTokens("correct-horse-battery", "only-a-quick-look-please")
    limits = Limits(connections_max=3)
    shy = MetricsOptions(f"{tmp_path}/metrics", has_devices=False)
    old = Daemon(limits, security=Security(tls), metrics=shy)
    await old.open_control(tmp_path / "control", tokens=tokens)
    await old.open_metrics()
    await old.listen([f"unix:{tmp_path}/nbd"])
    old.security.rules.by_command["a"] = parse_rules(["rw uid:0"])
    old.security.rules.kept["b"] = parse_rules(["ro uid:0"])
    assert await old.freeze(5) == []
    new = Daemon()
    offer = cast(Offer, Given(old))
    await new.take_over(offer)
    await new.go_on(offer)
    await old.close()
    forget_what_hangs()
    for server in old._http_servers():  # a process would end here
        assert server._listener is not None
        server._listener.close()
    assert new._control is not None
    assert new._control.tokens == tokens
    assert new._listener.limits == limits
    assert not new.monitor.has_device_metrics
    assert [uri.partition(":")[0] for uri in new.uris] == ["nbds+unix"]
    assert new.security.certificates()
    assert new.security.rules.texts() == ({"a": ("rw uid:0",)}, {"b": ("ro uid:0",)})
    await new.close()
    assert os.listdir(tmp_path) == []


async def test_device_that_leaves_the_file_keeps_its_rules_while_it_is_served() -> None:
    rules = {"a": ("none any",), "b": ("none any",)}
    server = Daemon(security=Security(by_export=rules))
    await server.registry.create("a", "0 8 zero")
    server.follow_rules(parse("", "/x.toml", {}))
    shown = [server.security.rules.access(name, Identity()) for name in "ab"]
    assert shown == [Access.NONE, Access.WRITE]
    server.follow_rules(parse("[device.a]", "/x.toml", {}))
    assert server.security.rules.access("a", Identity()) is Access.WRITE
    await server.close()


async def test_address_for_metrics_beside_a_socket_that_was_passed_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    address = tmp_path / "metrics"
    daemon = Daemon(metrics=MetricsOptions(str(address)))
    passed = socket.socket(socket.AF_UNIX)
    passed.bind(str(tmp_path / "passed"))
    passed.listen()
    await daemon.open_metrics(passed.detach())
    await daemon.close(has_served=False)
    assert caplog.messages == [
        f"metrics are on the socket that was passed, and not on {address}"
    ]
    assert not address.exists()


async def test_new_process_warns_of_what_it_takes_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its own configuration file may say another address by now."""
    old = Daemon()
    await old.open_control(tmp_path / "control")
    await old.listen(["tcp:0.0.0.0:0", f"unix:{tmp_path}/nbd"])
    (said,) = caplog.messages
    assert await old.freeze(5) == []
    caplog.clear()
    new = Daemon()
    offer = cast(Offer, Given(old))
    await new.take_over(offer)
    await new.go_on(offer)
    assert said in caplog.messages
    await old.close()
    forget_what_hangs()
    for server in old._http_servers():  # a process would end here
        assert server._listener is not None
        server._listener.close()
    await new.close()


async def test_passed_socket_that_other_machines_can_reach_is_warned_of(
    caplog: pytest.LogCaptureFixture,
) -> None:
    daemon = Daemon()
    with socket.socket() as everywhere, socket.socket() as here:
        everywhere.bind(("0.0.0.0", 0))
        here.bind(("127.0.0.1", 0))
        for each in (everywhere, here):
            each.listen()
        port = everywhere.getsockname()[1]
        await daemon.listen((), [os.dup(everywhere.fileno()), os.dup(here.fileno())])
    await daemon.close(has_served=False)
    warnings = [
        each.getMessage() for each in caplog.records if each.levelname == "WARNING"
    ]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"tcp:0.0.0.0:{port}: NBD without TLS")


async def test_log_says_why_a_hand_over_was_given_up(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also if the exception has no words: the signal to stop has cancelled it."""
    begun = asyncio.Event()

    async def hang(*_: object) -> None:
        begun.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(daemon_module, "hand_over", hang)
    server = Daemon()
    upgrading = asyncio.create_task(server.upgrade())
    await begun.wait()
    await server.close()
    await asyncio.wait([upgrading])
    assert upgrading.cancelled()
    assert "not handed over: the server stops" in caplog.messages
