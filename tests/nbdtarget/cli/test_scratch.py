# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget scratch` and `nbdtarget reset` as a user types them."""

import json
import signal
import subprocess
from pathlib import Path

import pytest

from nbdtarget.cli.scratch import _print
from nbdtarget.porcelain.scratch import MEMORY, ScratchPlan
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET


def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([NBDTARGET, *arguments], capture_output=True, text=True)


def test_copies_are_served_reset_and_forgotten(tmp_path: Path, runtime: Path) -> None:
    image = tmp_path / "golden.img"
    image.write_bytes(b"g" * 65536)
    command = [NBDTARGET, "scratch", str(image), "-n", "2", "--max", "4K", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            assert server.stdout is not None
            told = json.loads(server.stdout.readline())
            assert [each["name"] for each in told["copies"]] == ["golden-1", "golden-2"]
            assert (told["size"], told["size_max"]) == (65536, 4096)
            (uri,) = told["copies"][1]["uris"]
            with PlainClient(Path(uri.partition("socket=")[2]), "golden-2") as client:
                client.write(0, b"w" * 512)
                assert run("status", "golden-2").stdout == "0 128 scratch 1/8 0\n"
                assert run("reset", "golden-2").stderr == ""
                assert client.read(0, 512) == b"g" * 512
            assert "Device does not exist" in run("reset", "golden-3").stderr
        finally:
            server.send_signal(signal.SIGINT)
        assert server.wait() == 0
    assert image.read_bytes() == b"g" * 65536


def test_reset_of_nothing_is_refused() -> None:
    done = run("reset")
    assert done.returncode == 2
    assert "name a device, or give --uuid" in done.stderr


def test_what_is_printed_says_where_and_how_much(
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = tuple(f"g-{nr}" for nr in range(1, 8))
    plan = ScratchPlan("/g.img", names, 1 << 30, 1 << 20, "/tmp", 2 << 30)
    _print(plan, ["nbd+unix:///{name}?socket=/s"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "/g.img: 7 scratch copies: attach to"
    assert shown[5:7] == [
        "  nbd+unix:///g-5?socket=/s",
        "  … and so on up to g-7",
    ]
    assert shown[7] == (
        "Each may take up to 1 MiB, together 7 MiB, of files without a name in /tmp,"
        " where 2,048 MiB are free."
    )
    _print(plan._replace(names=("g-1",), store=MEMORY, free=None), ["nbd://h/{name}"])
    shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "/g.img: 1 scratch copy: attach to"
    assert shown[2] == "Each may take up to 1 MiB, together 1 MiB, of memory."
