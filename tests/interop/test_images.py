# SPDX-License-Identifier: Apache-2.0
"""Images in a format as typed: a clone boots from them, a cache stands before them, and nothing of them is left over."""

import json
import os
import random
import select
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.support.clients import needs, refused
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import PlainClient
from tests.support.processes import (
    NBDTARGET,
    ServerProcess,
    stop_stranger,
    wait_for_file,
)

ROOT = Path(__file__).parents[2]
MIB = 1 << 20
SIZE = 32 * MIB
DATA = 4 * MIB

pytestmark = [
    pytest.mark.interop,
    pytest.mark.long,
    needs("qemu-nbd", "qemu-img", "nbdkit"),
]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    with (tmp_path / "raw").open("wb") as file:
        file.write(content()[:DATA])
        file.truncate(SIZE)
    for name, options in (("a.qcow2", ["-c"]), ("b.qcow2", [])):
        argv = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", *options]
        subprocess.run([*argv, "raw", name], check=True)
    return tmp_path


def content() -> bytes:
    return random.Random(9).randbytes(DATA) + bytes(SIZE - DATA)


def serve(work: Path, *argv: str) -> ServerProcess:
    """Serve as typed in `work`; the export is called `d`."""
    socket, control = work / "d.sock", work / "control.sock"
    names = ["--name", "d", "--listen", f"unix:{socket}", "--control", str(control)]
    return ServerProcess([NBDTARGET, *argv, *names], sockets=[socket], log=work / "log")


def helpers(program: str, work: Path) -> list[int]:
    """The pids of helpers that have something in `work` open."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
        except (OSError, NotADirectoryError):
            continue
        if words[0] == program.encode() and any(str(work).encode() in w for w in words):
            found.append(int(entry.name))
    return found


def test_image_becomes_a_raw_disk_with_its_holes(work: Path) -> None:
    line = [NBDTARGET, "clone", "qemu:qcow2:a.qcow2", "disk", "--exit-when-hydrated"]
    line += ["--control", "c.sock", "--listen", f"unix:{work}/d.sock"]
    subprocess.run(line, check=True, capture_output=True, timeout=PATIENCE_S)
    assert (work / "disk").read_bytes() == content()
    assert (work / "disk").stat().st_blocks * 512 < SIZE // 2
    assert helpers("qemu-nbd", work) == []


def test_clone_of_another_image_is_refused_and_the_right_one_goes_on(
    work: Path,
) -> None:
    first = ["clone", "qemu:qcow2:a.qcow2", "disk", "--no-hydration"]
    with serve(work, *first) as server, PlainClient(work / "d.sock", "d") as client:
        client.write(0, b"w" * MIB)
        client.flush()
        server.terminate()
    told = subprocess.run(
        [NBDTARGET, "metadata", "info", "disk.nbdtarget"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "format=qcow2" in told
    assert f"image={work}/a.qcow2" in told
    for other, reason in (
        ("qemu:qcow2:b.qcow2", "its image is"),
        ("nbdkit:file?file=raw", "give the right disk"),
        ("raw", "it was a helper and is a file"),
    ):
        line = [NBDTARGET, "clone", other, "disk", "--control", "c.sock"]
        assert reason in refused(line)
    with (work / "a.qcow2").open("r+b") as file:
        first_byte = file.read(1)
        file.seek(0)
        file.write(first_byte)
    assert "written to" in refused(
        [NBDTARGET, "clone", first[1], "disk", "--control", "c.sock"]
    )
    again = [NBDTARGET, *first[:3], "--accept-other-disk", "--exit-when-hydrated"]
    again += ["--control", "c.sock", "--listen", f"unix:{work}/d.sock"]
    subprocess.run(again, check=True, capture_output=True, timeout=PATIENCE_S)
    assert (work / "disk").read_bytes() == b"w" * MIB + content()[MIB:]


@pytest.mark.parametrize(
    ("name", "program"),
    [
        ("qemu:qcow2:{}/a.qcow2", "qemu-nbd"),
        ("nbdkit:file?file={}/raw", "nbdkit"),
    ],
    ids=["qemu-nbd", "nbdkit"],
)
def test_helper_ends_with_a_server_that_is_killed(
    work: Path, name: str, program: str
) -> None:
    with (
        serve(work, "export", "--readonly", name.format(work)) as server,
        PlainClient(work / "d.sock", "d") as client,
    ):
        assert client.read(0, MIB) == content()[:MIB]
        (pid,) = helpers(program, work)
        handle = os.pidfd_open(pid)
        server.kill()
    wait_for_end(handle)


def wait_for_end(handle: int) -> None:
    try:
        assert select.select([handle], [], [], PATIENCE_S)[0], "it still runs"
    finally:
        os.close(handle)


def test_read_only_cache_before_an_image(work: Path) -> None:
    line = ["cache", "qemu:qcow2:a.qcow2", "fast", "--cache-size", "8M"]
    with serve(work, *line) as server:
        with PlainClient(work / "d.sock", "d") as client:
            for _ in range(3):
                assert client.read(0, SIZE) == content()
        assert server.terminate() == 0
    assert helpers("qemu-nbd", work) == []


def test_command_of_the_configuration_file(work: Path) -> None:
    file = work / "c.toml"
    command = ["nbdkit", "-r", "-f", "file", f"file={work}/raw"]
    file.write_text(
        f"[helper.vault]\ncommand = {json.dumps(command)}\n"
        "[device.d]\nreadonly = true\ntable = '0 65536 linear helper:vault 0'\n"
    )
    argv = [NBDTARGET, "serve", "--config", str(file), "--listen"]
    argv += [f"unix:{work}/d.sock", "--control", str(work / "c.sock")]
    with (
        ServerProcess(argv, sockets=[work / "d.sock"], log=work / "log") as server,
        PlainClient(work / "d.sock", "d") as client,
    ):
        assert client.read(0, MIB) == content()[:MIB]
        assert len(helpers("nbdkit", work)) == 1
        assert server.terminate() == 0
    assert helpers("nbdkit", work) == []


def test_name_of_a_remote_image_says_its_format(work: Path) -> None:
    with on_the_web(work / "a.qcow2") as url:
        line = [NBDTARGET, "clone", f"{url}/a.qcow2", "disk", "--exit-when-hydrated"]
        line += ["--control", "c.sock", "--listen", f"unix:{work}/d.sock"]
        subprocess.run(line, check=True, capture_output=True, timeout=PATIENCE_S)
        assert (work / "disk").read_bytes() == content()
        assert (work / "disk").stat().st_blocks * 512 < SIZE // 2
    # The name says the format, and the content must agree: the format is never guessed.
    with on_the_web(work / "raw") as other:
        line = [NBDTARGET, "clone", f"{other}/a.qcow2", "d", "--control", "c.sock"]
        assert "not in qcow2 format" in refused(line)
    assert helpers("qemu-nbd", work) == []
    told = subprocess.run(
        [NBDTARGET, "metadata", "info", "disk.nbdtarget"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert f"format=qcow2, url={url}/a.qcow2, etag=" in told


@contextmanager
def on_the_web(file: Path) -> Iterator[str]:
    """A web server on which every path is `file`; its URL."""
    port = file.with_suffix(".port")
    argv = [sys.executable, "-m", "scripts.store_server", str(file), str(port)]
    with subprocess.Popen([*argv, "--latency-ms", "0"], cwd=ROOT) as server:
        try:
            assert wait_for_file(port)
            yield f"http://127.0.0.1:{port.read_text()}"
        finally:
            server.kill()


def test_successor_opens_the_image_with_a_helper_of_its_own(work: Path) -> None:
    with serve(work, "export", "--readonly", "qemu:qcow2:a.qcow2") as server:
        (before,) = helpers("qemu-nbd", work)
        with PlainClient(work / "d.sock", "d") as client:
            assert client.read(0, MIB) == content()[:MIB]
            control = str(work / "control.sock")
            said = subprocess.run(
                [NBDTARGET, "upgrade", "--json", "--control", control],
                check=True,
                capture_output=True,
                timeout=PATIENCE_S,
            ).stdout
            assert client.read(MIB, MIB) == content()[MIB : 2 * MIB]
        assert server is not None
        after = helpers("qemu-nbd", work)
        stop_stranger(json.loads(said)["pid"])
        assert len(after) == 1
        assert after != [before]
    assert helpers("qemu-nbd", work) == []
