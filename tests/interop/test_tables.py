# SPDX-License-Identifier: Apache-2.0
"""Plumbing: tables made with dmsetup's verbs, stacked, and read by a real client."""

import contextlib
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.clients import MIB, client, needs, report
from tests.support.command_line import in_process
from tests.support.patience import PATIENCE_S, wait_until
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = [pytest.mark.interop, needs("qemu-io")]

SECTORS = 8 * MIB // 512


class Served:
    """A server with a control socket, and `nbdtarget` commands for it."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.socket = work / "nbd.sock"
        self.control = work / "control.sock"

    def __call__(self, *words: str, status: int = 0) -> str:
        with contextlib.chdir(self.work):
            done = in_process(*words, "--control", str(self.control))
        assert done.returncode == status, done.stderr
        return done.stdout

    def qemu_io(self, export: str, *commands: str, status: int = 0) -> str:
        words = [word for command in commands for word in ("-c", command)]
        uri = f"nbd+unix:///{export}?socket={self.socket}"
        return client("qemu-io", "--format=raw", *words, uri, status=status)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    it = Served(tmp_path)
    argv = [NBDTARGET, "serve", "--listen", f"unix:{it.socket}"]
    process = ServerProcess(
        [*argv, "--control", str(it.control)],
        sockets=[it.socket, it.control],
        log=tmp_path / "log",
    )
    try:
        yield it
    except BaseException:
        process.kill()
        raise
    assert process.terminate() == 0
    assert "Traceback" not in (tmp_path / "log").read_text()


@pytest.fixture
def clone_table(tmp_path: Path) -> str:
    with (tmp_path / "source").open("wb") as file:
        for number in range(8):
            file.write(bytes([number + 1]) * MIB)
    (tmp_path / "dest").touch()
    os.truncate(tmp_path / "dest", 8 * MIB)
    return f"0 {SECTORS} clone meta dest source 128 1 no_hydration"


def test_linear_over_clone_reads_the_part_it_maps(
    served: Served, clone_table: str
) -> None:
    served("create", "below", "--table", clone_table)
    served("create", "part", "--table", "0 4096 linear /dev/mapper/below 4096")
    served.qemu_io("part", "read -P 3 0 64k", "read -P 3 512 1k", "read -P 4 1M 1M")
    served.qemu_io("part", "write -P 0x99 1M 10k", "flush")
    served.qemu_io("below", "read -P 0x99 3M 10k", "read -P 4 3082k 1k")
    served("remove", "below", status=1)  # in use
    served("remove", "part")
    served("remove", "below")


@needs("nbdinfo")
def test_stack_over_clone_shows_the_hydration_below(
    served: Served, clone_table: str
) -> None:
    served("create", "below", "--table", clone_table)
    line = "0 1024 linear /dev/mapper/below 4096"
    served("create", "part", "--table", line, "--table", "1024 1024 zero")
    served.qemu_io("below", "write 2112k 64k")
    uri = f"nbd+unix:///part?socket={served.socket}"
    words = ["--map=x-nbdtarget:hydration", "--json"]
    extents = [(e["length"], e["type"]) for e in report("nbdinfo", *words, uri)]
    # 1 means not hydrated. Ranges outside of a clone are 0, because they need no copy.
    kib = 1024
    assert extents == [(64 * kib, 1), (64 * kib, 0), (384 * kib, 1), (512 * kib, 0)]


def test_request_over_two_targets_ends_once(served: Served, tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(b"\x07" * MIB)
    line = "0 2048 linear disk 0"
    served("create", "mix", "--table", line, "--table", "2048 2048 zero")
    served.qemu_io("mix", "read -P 7 0 1M", "read -P 0 1M 1M")
    served.qemu_io("mix", "write -P 5 1000k 100k", "flush", "read -P 5 1000k 24k")
    assert (tmp_path / "disk").read_bytes()[1000 * 1024 :] == b"\x05" * (24 * 1024)


def test_suspended_device_answers_after_resume(
    served: Served, clone_table: str
) -> None:
    served("create", "disk", "--table", clone_table)
    served("suspend", "disk")
    uri = f"nbd+unix:///disk?socket={served.socket}"
    reader = subprocess.Popen(
        ["qemu-io", "--format=raw", "-c", "read -P 1 0 4k", uri],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    try:
        assert "SUSPENDED" in served("info", "disk")
        assert reader.poll() is None
        served("resume", "disk")
        assert reader.wait(PATIENCE_S) == 0
    finally:
        reader.kill()
        reader.wait()


@pytest.mark.long
def test_clone_hydrates_on_message_and_says_so(
    served: Served, clone_table: str, tmp_path: Path
) -> None:
    served("create", "disk", "--table", clone_table)
    assert " 0/128 0 " in served("status", "disk")
    served("message", "disk", "0", "enable_hydration")
    wait_until(lambda: " 128/128 0 " in served("status", "disk"))
    served("remove", "disk")
    assert (tmp_path / "dest").read_bytes() == (tmp_path / "source").read_bytes()
