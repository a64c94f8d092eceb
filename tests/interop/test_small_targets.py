# SPDX-License-Identifier: Apache-2.0
"""Each example of the kernel's documentation for the small targets does what it says.

Source: Documentation/admin-guide/device-mapper: linear, striped, zero, delay, dm-flakey,
dm-dust, log-writes. Our devices are files, `dmsetup` is `nbdtarget`, `replay-log` is
`nbdtarget replay-log`, and who reads and writes is an NBD client. What the kernel would log is an
answer or an error here. And powercut, end to end.
"""

import contextlib
import errno as errnos
import io
import os
import random
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nbdtarget.cli.app import run
from tests.support.clients import needs, report
from tests.support.plain_client import (
    CMD_FLUSH,
    CMD_READ,
    CMD_WRITE,
    FLAG_FUA,
    PlainClient,
)
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = pytest.mark.interop

SECTOR = 512
NBD_EIO = errnos.EIO


class Host:
    """A server, its commands, and a directory of disks."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.socket = work / "nbd.sock"
        self.control = work / "control.sock"

    def __call__(self, *words: str, status: int = 0) -> str:
        """Run `nbdtarget`. Returns what it prints; if it must fail, to stderr."""
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            assert run([*words]) == status, err.getvalue()
        return err.getvalue() if status else out.getvalue()

    def disk(self, name: str, sectors: int, content: bytes = b"") -> str:
        path = self.work / name
        path.write_bytes(content)
        os.truncate(path, sectors * SECTOR)
        return str(path)

    def client(self, export: str) -> PlainClient:
        return PlainClient(self.socket, export)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    host = Host(tmp_path_factory.mktemp("small"))
    argv = [NBDTARGET, "serve", "--listen", f"unix:{host.socket}"]
    log = host.work / "server.log"
    process = ServerProcess(
        [*argv, "--control", str(host.control)],
        sockets=[host.socket, host.control],
        log=log,
    )
    try:
        yield host
    except BaseException:
        process.kill()
        raise
    assert process.terminate() == 0
    assert "Traceback" not in log.read_text()


@pytest.fixture
def host(server: Host, monkeypatch: pytest.MonkeyPatch) -> Iterator[Host]:
    monkeypatch.setenv("NBDTARGET_CONTROL", str(server.control))
    yield server
    server("remove_all")


def error_of(
    client: PlainClient, command: int, offset: int, payload: bytes = b""
) -> int:
    """The error that one sector's request ends with, or 0."""
    length = 0 if payload else SECTOR
    cookie = client.send(command, offset, length, payload=payload)
    answered, error, _ = client.receive()
    assert answered == cookie
    return error


def test_linear_examples(host: Host) -> None:
    content = [random.Random(nr).randbytes(3 * 4096 * SECTOR) for nr in range(2)]
    one, two = (host.disk(f"l{nr}", 3 * 4096, data) for nr, data in enumerate(content))
    host("create", "identity", "--table", f"0 12288 linear {one} 0")
    with host.client("identity") as client:
        assert client.read(0, 4096) == content[0][:4096]
    host("remove", "identity")
    host(
        "create",
        "joined",
        "--table",
        f"0 12288 linear {one} 0\n12288 12288 linear {two} 0",
    )
    with host.client("joined") as client:
        assert client.size == 2 * 12288 * SECTOR
        assert client.read(12287 * SECTOR, 1024) == content[0][-512:] + content[1][:512]
    host("remove", "joined")
    # 4M chunks, joined together in reverse order; 4 MiB are 8192 sectors. Here 2 MiB.
    lines = [f"{nr * 4096} 4096 linear {one} {(2 - nr) * 4096}" for nr in range(3)]
    host("create", "reverse", "--table", "\n".join(lines))
    with host.client("reverse") as client:
        chunk = 4096 * SECTOR
        assert client.read(0, chunk) == content[0][2 * chunk :]
        assert client.read(2 * chunk, chunk) == content[0][:chunk]


def test_striped_example(host: Host) -> None:
    """A chunk size of 128 KiB across any number of devices."""
    chunk = 256 * SECTOR
    disks = [host.disk(f"s{nr}", 1024 + nr) for nr in range(3)]
    size = 1024 * 3 - 1024 * 3 % (256 * 3)
    runs = " ".join(f"{disk} 0" for disk in disks)
    host("create", "stripe_dev", "--table", f"0 {size} striped 3 256 {runs}")
    names = " ".join(disks)
    assert host("status", "stripe_dev") == f"0 {size} striped 3 {names} 1 AAA\n"
    data = random.Random(1).randbytes(6 * chunk)
    with host.client("stripe_dev") as client:
        client.write(0, data)
        client.flush()
        assert client.read(chunk - 10, 20) == data[chunk - 10 : chunk + 10]
    for nr, disk in enumerate(disks):
        expected = data[nr * chunk :][:chunk] + data[(nr + 3) * chunk :][:chunk]
        assert Path(disk).read_bytes()[: 2 * chunk] == expected


def test_zero_example(host: Host) -> None:
    """A zero device of 10 TB reads as zeroes. The example's snapshot target does not exist here."""
    sectors = 10 * 1024**4 // SECTOR
    host("create", "zero1", "--table", f"0 {sectors} zero")
    with host.client("zero1") as client:
        assert client.size == 10 * 1024**4
        client.write(5 * 1024**4, b"forgotten")
        assert client.read(5 * 1024**4, 9) == bytes(9)


@pytest.mark.long
@pytest.mark.slow
def test_delay_examples(host: Host) -> None:
    one, two = host.disk("d1", 16384), host.disk("d2", 16384)
    host("create", "delayed", "--table", f"0 8192 delay {one} 0 500")
    with host.client("delayed") as client:
        for command in (CMD_READ, CMD_FLUSH):
            begin = time.monotonic()
            cookie = client.send(command, 0, SECTOR * (command == CMD_READ))
            assert client.receive()[:2] == (cookie, 0)
            assert time.monotonic() - begin >= 0.5
    host("remove", "delayed")
    # Reads from one device, writes and flushes to another one, at offsets of their own.
    host("create", "delayed", "--table", f"0 8192 delay {one} 2048 0 {two} 4096 400")
    with host.client("delayed") as client:
        begin = time.monotonic()
        client.write(0, b"x" * SECTOR)
        assert time.monotonic() - begin >= 0.4
        assert client.read(0, SECTOR) == bytes(SECTOR)
    assert Path(two).read_bytes()[4096 * SECTOR :][:SECTOR] == b"x" * SECTOR
    host("remove", "delayed")
    line = f"{one} 0 50 {one} 0 100 {one} 0 333"
    host("create", "delayed", "--table", f"0 8192 delay {line}")
    assert host("table", "delayed") == f"0 8192 delay {line}\n"
    with host.client("delayed") as client:
        requests = [
            client.request(CMD_FLUSH),
            client.request(CMD_WRITE, payload=b"y" * SECTOR),
            client.request(CMD_READ, SECTOR, SECTOR),
        ]
        flush, write, read = (cookie for cookie, _ in requests)
        begin = time.monotonic()
        # All are sent at once: on a busy machine the last one could otherwise be sent after the second one's delay is over.
        client.sock.sendall(b"".join(request for _, request in requests))
        assert [client.receive()[0] for _ in range(3)] == [read, write, flush]
        assert time.monotonic() - begin >= 0.333


def test_flakey_examples(host: Host) -> None:
    disk = host.disk("f", 16, bytes(range(256)) * 32)
    table = f"0 16 flakey {disk} 0 0 60"
    # Replaces the 32nd byte of READ bios with the value 1.
    host("create", "flaky", "--table", f"{table} 5 corrupt_bio_byte 32 r 1 0")
    with host.client("flaky") as client:
        expected = bytearray(bytes(range(256)) * 2)
        expected[31] = 1
        assert client.read(0, SECTOR) == expected
    host("remove", "flaky")
    # Replaces the 224th byte of REQ_META (=32) bios with 0. NBD requests have no META flag, so nothing is replaced.
    host("create", "flaky", "--table", f"{table} 5 corrupt_bio_byte 224 w 0 32")
    with host.client("flaky") as client:
        client.write(0, b"x" * SECTOR)
        assert client.read(0, SECTOR) == b"x" * SECTOR
    host("remove", "flaky")
    host("create", "flaky", "--table", table)
    with host.client("flaky") as client:
        assert error_of(client, CMD_READ, 0) == NBD_EIO
        assert error_of(client, CMD_WRITE, 0, b"y" * SECTOR) == NBD_EIO
    # The server ends with status 1, because it cannot flush this device when it removes it.
    host("load", "flaky", "--table", f"0 16 linear {disk} 0")
    host("suspend", "--noflush", "flaky")
    host("resume", "flaky")


def test_dust_examples(host: Host) -> None:
    disk = host.disk("vdb1", 33552384)
    host("create", "dust4k", "--table", f"0 33552384 dust {disk} 0 4096")
    host("remove", "dust4k")
    host("create", "dust1", "--table", f"0 33552384 dust {disk} 0 512")
    mode = f"0 33552384 dust {disk}"
    assert host("status", "dust1") == f"{mode} bypass verbose\n"
    with host.client("dust1") as client:
        assert client.read(0, 128 * SECTOR) == bytes(128 * SECTOR)
        client.write(0, bytes(128 * SECTOR))
        for block in ("60", "67", "72", "87", "88"):
            assert host("message", "dust1", "0", "addbadblock", block) == ""
        client.read(60 * SECTOR, SECTOR)
        host("message", "dust1", "0", "enable")
        assert host("status", "dust1") == f"{mode} fail_read_on_bad_block verbose\n"
        assert error_of(client, CMD_READ, 67 * SECTOR) == NBD_EIO
        err = host("message", "dust1", "0", "addbadblock", "88", status=1)
        assert "block 88 already in badblocklist" in err
        query = host("message", "dust1", "0", "queryblock", "72")
        assert query == "dust_query_block: block 72 found in badblocklist\n"
        client.write(0, bytes(88 * SECTOR))
    err = host("message", "dust1", "0", "removebadblock", "87", status=1)
    assert "block 87 not found in badblocklist" in err
    query = host("message", "dust1", "0", "queryblock", "72")
    assert query == "dust_query_block: block 72 not found in badblocklist\n"
    count = host("message", "dust1", "0", "countbadblocks")
    assert count == "countbadblocks: 1 badblock(s) found\n"
    assert host("message", "dust1", "0", "listbadblocks") == "88\n"
    for found in ("badblocks cleared", "no badblocks found"):
        cleared = host("message", "dust1", "0", "clearbadblocks")
        assert cleared == f"dust_clear_badblocks: {found}\n"
    for noise in ("quiet", "verbose"):
        host("message", "dust1", "0", "quiet")
        assert host("status", "dust1") == f"{mode} fail_read_on_bad_block {noise}\n"


def test_log_writes_examples(host: Host) -> None:
    sdb, sdc = host.disk("sdb", 128), host.disk("sdc", 4096)
    host("create", "log", "--table", f"0 128 log-writes {sdb} {sdc}")
    with host.client("log") as client:
        client.write(0, b"m" * 4096)  # what mkfs would do
        client.flush()
        host("message", "log", "0", "mark", "mkfs")
        client.write(8192, b"f" * 4096)  # some test that does fsync at the end
        client.flush()
        host("message", "log", "0", "mark", "fsync")
        client.write(8192, b"later" * 1024, flags=FLAG_FUA)
    at_fsync = b"m" * 4096 + bytes(4096) + b"f" * 4096 + bytes(128 * SECTOR - 12288)
    host("remove", "log")
    sdd = host.disk("sdd", 128)
    host("replay-log", "--log", sdc, "--replay", sdd, "--end-mark", "fsync")
    assert Path(sdd).read_bytes() == at_fsync
    # The other option: up to the mkfs, then on, with an fsck at each FUA.
    sde = host.disk("sde", 128)
    host("replay-log", "--log", sdc, "--replay", sde, "--end-mark", "mkfs")
    assert Path(sde).read_bytes() == at_fsync[:4096].ljust(128 * SECTOR, b"\0")
    fsck = f"cp {sde} {sde}.seen"
    words = ["--start-mark", "mkfs", "--fsck", fsck, "--check", "fua"]
    host("replay-log", "--log", sdc, "--replay", sde, *words)
    assert Path(sde).read_bytes() == Path(sdb).read_bytes()
    assert Path(f"{sde}.seen").read_bytes() == Path(sdb).read_bytes()
    last = host("replay-log", "--log", sdc, "--list").splitlines()[-1]
    assert last.endswith("flags 0x8(MARK) dm-log-writes-end")


def test_powercut_forgets_what_was_not_flushed(host: Host) -> None:
    disk = host.disk("p", 2048)
    host("create", "p", "--table", f"0 2048 powercut {disk} 0")
    with host.client("p") as client:
        client.write(0, b"flushed!" * 512)
        client.flush()
        client.write(8192, b"with FUA" * 512, flags=FLAG_FUA)
        client.write(0, b"not yet " * 512)
        client.write(65536, b"not yet " * 512)
        assert client.read(0, 8) == b"not yet "
        assert host("status", "p") == "0 2048 powercut on 2 8192 0\n"
        answer = host("message", "p", "0", "cut", "drop", "1")
        assert answer == "drop 1: 2 writes of 16 sectors at risk, 0 sectors survive\n"
        assert error_of(client, CMD_READ, 0) == NBD_EIO
        assert error_of(client, CMD_WRITE, 0, b"x" * SECTOR) == NBD_EIO
    host("message", "p", "0", "on")
    with host.client("p") as client:
        assert client.read(0, 4096) == b"flushed!" * 512
        assert client.read(8192, 4096) == b"with FUA" * 512
        assert client.read(65536, 4096) == bytes(4096)
    host("remove", "p")
    assert Path(disk).read_bytes()[:8] == b"flushed!"


@needs("nbdinfo")
def test_nbdinfo_is_told_whether_the_disk_is_rotational(host: Host) -> None:
    disk = host.disk("disk", 8)
    host("create", "r", "--rotational", "--table", f"0 8 linear {disk} 0")
    host("create", "n", "--no-rotational", "--table", "0 8 linear /dev/mapper/r 0")
    host("create", "s", "--table", "0 8 linear /dev/mapper/r 0")
    seen = {
        name: report("nbdinfo", "--json", f"nbd+unix:///{name}?socket={host.socket}")
        for name in ("r", "n", "s")
    }
    told = {name: each["exports"][0]["is_rotational"] for name, each in seen.items()}
    assert told == {"r": True, "n": False, "s": True}
