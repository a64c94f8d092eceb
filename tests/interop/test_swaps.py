# SPDX-License-Identifier: Apache-2.0
"""Tables are swapped under full client load: nothing is lost, reordered or failed."""

import os
import random
import threading
from pathlib import Path
from typing import Final

import pytest

from nbdtarget.control import messages as m
from nbdtarget.control.client import ControlClient
from nbdtarget.control.paths import control_address
from tests.support.clients import MIB
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    FLAG_FUA,
    PlainClient,
)
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = [pytest.mark.interop, pytest.mark.slow]

SIZE: Final = 4 * MIB
SECTORS: Final = SIZE // 512
BLOCK: Final = 4096
DEPTH: Final = 32
SWAPS: Final = 100

CLONE: Final = f"0 {SECTORS} clone meta dest source 128"
# All of them show the same bytes: what is written through one is read through the next.
TOPS: Final = (
    f"0 {SECTORS} linear /dev/mapper/below 0",
    f"0 1000 linear /dev/mapper/below 0\n"
    f"1000 {SECTORS - 1000} linear /dev/mapper/below 1000",
    f"0 4096 delay /dev/mapper/below 0 1\n"
    f"4096 {SECTORS - 4096} linear /dev/mapper/below 4096",
)


class Load(threading.Thread):
    """Writes and reads blocks, DEPTH at a time, until it is told to stop.

    Attributes:
        model: what was written.
        nr_requests: answered so far.
        failure: what went wrong first.
    """

    def __init__(self, socket: Path, model: bytearray) -> None:
        super().__init__(daemon=True)
        self.model = model
        self.nr_requests = 0
        self.failure: BaseException | None = None
        self._socket = socket
        self._is_stopping = threading.Event()
        self._random = random.Random(1)
        self._busy: dict[int, int] = {}  # cookie: block, or -1
        self._expected: dict[int, bytes] = {}

    def stop(self) -> None:
        self._is_stopping.set()
        self.join(PATIENCE_S)
        assert not self.is_alive(), "a request was lost"
        if self.failure is not None:
            raise self.failure

    def run(self) -> None:
        try:
            with PlainClient(self._socket, "top") as client:
                while not self._is_stopping.is_set():
                    while len(self._busy) < DEPTH:
                        self._send(client)
                    self._receive(client)
                while self._busy:
                    self._receive(client)
        except BaseException as error:
            self.failure = error

    def _send(self, client: PlainClient) -> None:
        rng = self._random
        blocks = set(self._busy.values())
        block = rng.choice([b for b in range(SIZE // BLOCK) if b not in blocks])
        at = block * BLOCK
        match rng.randrange(20):
            case 0:
                self._busy[client.send(CMD_FLUSH)] = -1
            case kind if kind < 10:
                data = rng.randbytes(BLOCK)
                self.model[at : at + BLOCK] = data
                flags = FLAG_FUA if kind == 1 else 0
                self._busy[client.send(CMD_WRITE, at, payload=data, flags=flags)] = (
                    block
                )
            case _:
                cookie = client.send(CMD_READ, at, BLOCK)
                self._busy[cookie] = block
                self._expected[cookie] = bytes(self.model[at : at + BLOCK])

    def _receive(self, client: PlainClient) -> None:
        cookie, error, data = client.receive()
        assert error == 0, f"block {self._busy[cookie]}: error {error}"
        expected = self._expected.pop(cookie, b"")
        assert data == expected, f"block {self._busy[cookie]}: not what was written"
        del self._busy[cookie]
        self.nr_requests += 1


@pytest.mark.long
def test_swaps_under_load_lose_and_fail_nothing(tmp_path: Path) -> None:
    content = random.Random(2).randbytes(SIZE)
    (tmp_path / "source").write_bytes(content)
    (tmp_path / "dest").touch()
    os.truncate(tmp_path / "dest", SIZE)
    socket, control = tmp_path / "nbd.sock", tmp_path / "control.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{socket}"]
    log = tmp_path / "log"
    process = ServerProcess(
        [*argv, "--control", str(control)], sockets=[socket, control], log=log
    )
    client = ControlClient(control_address(str(control)))
    directory = str(tmp_path)

    def swap(name: str, table: str, *, noflush: bool) -> None:
        client.ask("load", m.Load(name, table, directory=directory), m.Done)
        client.ask("suspend", m.Suspend(name, noflush), m.Done)
        client.ask("resume", m.Resume(name), m.Done)

    try:
        for name, table in (("below", CLONE), ("top", TOPS[0])):
            client.ask("create", m.Create(name, table, directory=directory), m.Done)
        load = Load(socket, bytearray(content))
        load.start()
        rng = random.Random(3)
        for nr in range(SWAPS):
            if rng.random() < 0.3:
                swap("below", CLONE, noflush=rng.random() < 0.5)
            else:
                swap("top", TOPS[nr % len(TOPS)], noflush=rng.random() < 0.5)
        load.stop()
        with PlainClient(socket, "top") as reader:
            disk = b"".join(reader.read(at, MIB) for at in range(0, SIZE, MIB))
    except BaseException:
        process.kill()
        print(log.read_text())
        raise
    assert disk == load.model
    assert load.nr_requests > SWAPS
    assert process.terminate() == 0, log.read_text()
    assert (tmp_path / "source").read_bytes() == content
