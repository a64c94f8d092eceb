# SPDX-License-Identifier: Apache-2.0
"""The old process's side of a hand-over: whatever the new one does, one of the two serves."""

import asyncio
import sys
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from nbdtarget import __version__
from nbdtarget.common.errors import NbdTargetError
from nbdtarget.daemon.handover import giver, program
from nbdtarget.daemon.handover.channel import Channel
from nbdtarget.daemon.handover.giver import hand_over
from nbdtarget.daemon.handover.messages import FORMAT, Moved
from nbdtarget.daemon.handover.program import VARIABLE
from nbdtarget.devices import resolve
from nbdtarget.dm.handover import Parking
from nbdtarget.dm.mapped_device import State
from nbdtarget.dm.registry import Registry
from tests.support.dm import make_registry
from tests.support.handover import moved
from tests.support.patience import PATIENCE_S

# The new process: what it says, one after the other. "?" waits for a message; "." ends.
NEW = """
import os, signal, socket, struct, sys
import msgspec
sock = socket.socket(fileno=int(os.environ[sys.argv[1]]))
def say(**fields):
    raw = msgspec.msgpack.encode(fields)
    sock.sendall(struct.pack(">II", len(raw), 0) + raw)
def hear():
    length, _ = struct.unpack(">II", sock.recv(8, socket.MSG_WAITALL))
    return msgspec.msgpack.decode(sock.recv(length, socket.MSG_WAITALL))
hear()
exec(sys.argv[2])
"""
HELLO = f'say(type="Hello", format={FORMAT}, version="9"); moved = hear(); '


class Server:
    """The server that hands over: a registry with one device. `log` has the calls so far."""

    def __init__(self) -> None:
        self.registry: Registry
        self.registry, self.opener = make_registry(a=8192)
        self.log: list[str] = []
        self.busy: list[str] = []

    async def freeze(self, within_s: float) -> list[str]:
        self.log.append("freeze")
        return self.busy

    async def thaw(self) -> None:
        self.log.append("thaw")

    def parking(self) -> Parking:
        return Parking(self.registry)

    def moved(self, parking: Parking) -> tuple[Moved, list[int]]:
        self.log.append("moved")
        return moved(parking.states), []

    async def hand_over(self, script: str) -> None:
        heir = await hand_over(self, [sys.executable, "-c", NEW, VARIABLE, script])
        assert heir.wait(PATIENCE_S) == 0

    def check_goes_on(self, log: list[str]) -> None:
        """Check that these steps were done, and that the server continues as before."""
        assert self.log == log
        (device,) = self.registry.devices()
        assert device.state is State.ACTIVE
        assert device.table() == [(0, 8, "linear", "/a 0")]


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server()
    await server.registry.create("d", "0 8 linear /a 0")
    yield server
    await server.registry.close()


async def test_it_hands_over(server: Server) -> None:
    script = (
        'assert moved["devices"][0]["table"] == "0 8 linear /a 0"; '
        'say(type="Prepared"); assert hear()["type"] == "Go"'
    )
    await server.hand_over(HELLO + script)
    assert server.log == ["freeze", "moved"]
    (device,) = server.registry.devices()
    assert device.state is State.SUSPENDED
    assert not device.has_table


async def test_who_is_cancelled_after_go_does_not_go_on_beside_the_new_process(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Go cannot be taken back: after it only one of the two processes may serve."""
    loop, ends = asyncio.get_running_loop(), list[str]()
    send = Channel._send

    def send_and_cancel(self: Channel, raw: bytes, fds: Sequence[int]) -> None:
        send(self, raw, fds)
        if b"Go" in raw:
            loop.call_soon_threadsafe(task.cancel)

    async def hand_it_over() -> None:
        script = HELLO + 'say(type="Prepared"); assert hear()["type"] == "Go"'
        try:
            await server.hand_over(script)
            ends.append("handed over")
        except asyncio.CancelledError:
            ends.append("cancelled")

    monkeypatch.setattr(Channel, "_send", send_and_cancel)
    task = asyncio.create_task(hand_it_over())
    await asyncio.wait([task])
    assert ends == ["handed over"]
    assert server.log == ["freeze", "moved"]


@pytest.mark.parametrize(
    ("script", "reason", "log"),
    [
        ("", "the new program ended with status 0 before it was ready; it said n", []),
        (
            'raise RuntimeError("broken update")',
            r"ended with status 1 before it was ready; its last lines: Traceback .* /"
            r" RuntimeError: broken update$",
            [],
        ),
        (
            f'say(type="Hello", format={FORMAT + 1}, version="9"); hear()',
            rf"^nbdtarget 9 hands over in format 3, and nbdtarget {__version__}, which",
            [],
        ),
        ('say(type="Failed", reason="no config")', "^no config$", []),
        ('say(type="Prepared"); hear()', "says Prepared out of turn", []),
        (HELLO, "ended with status 0 before it was", ["freeze", "moved", "thaw"]),
        (
            HELLO + 'os.close(sock.detach()); sys.stderr.write("I go on");'
            " sys.stderr.flush(); signal.pause()",
            "^the new program closed its end before it was ready; its last lines: I go",
            ["freeze", "moved", "thaw"],
        ),
        (
            HELLO + 'say(type="Failed", reason="no disk")',
            "^no disk$",
            ["freeze", "moved", "thaw"],
        ),
        (HELLO + "hear()", r"does not answer for 0\.3 s", ["freeze", "moved", "thaw"]),
    ],
)
async def test_a_new_process_that_fails_leaves_everything_as_it_was(
    server: Server,
    monkeypatch: pytest.MonkeyPatch,
    script: str,
    reason: str,
    log: list[str],
) -> None:
    if "closed its end" in reason:
        monkeypatch.setattr(program, "ENDED_S_MAX", 0.2)
    if "does not answer" in reason:
        monkeypatch.setattr(giver, "PREPARE_S_MAX", 0.3)
    with pytest.raises(NbdTargetError, match=reason):
        await server.hand_over(script)
    server.check_goes_on(log)


async def test_a_disk_that_cannot_be_opened_again_is_named_with_the_reason(
    server: Server,
) -> None:
    del server.opener.sizes["/a"]  # it is open, and could not be opened once more
    with pytest.raises(
        NbdTargetError, match=r"^no disk; not .*: d does not.*/a: No such file"
    ):
        await server.hand_over(HELLO + 'say(type="Failed", reason="no disk")')
    assert server.log == ["freeze", "moved", "thaw"]
    device = server.registry.get("d")
    assert device.state is State.ACTIVE
    assert "No such file" in device.failure


async def test_a_disk_that_is_known_to_have_gone_refuses_before_clients_wait(
    server: Server, tmp_path: Path
) -> None:
    path = tmp_path / "disk"
    path.write_bytes(bytes(4096))
    server.registry.opens.opener = resolve
    await server.registry.create("f", f"0 8 linear {path} 0")
    path.unlink()
    with pytest.raises(NbdTargetError, match=r"f: .*/disk: No such file or directory"):
        await server.hand_over(HELLO)
    assert server.log == []
    assert server.registry.get("f").state is State.ACTIVE


async def test_requests_that_do_not_end_leave_everything_as_it_was(
    server: Server,
) -> None:
    server.busy = ["client 7"]
    with pytest.raises(NbdTargetError, match="requests of client 7 have not ended"):
        await server.hand_over(HELLO)
    server.check_goes_on(["freeze", "thaw"])


async def test_a_program_that_is_not_there_is_named(server: Server) -> None:
    with pytest.raises(NbdTargetError, match="/nonexistent/nbdtarget: No such file"):
        await hand_over(server, ["/nonexistent/nbdtarget"])
    server.check_goes_on([])
