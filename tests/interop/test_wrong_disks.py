# SPDX-License-Identifier: Apache-2.0
"""A typing error destroys no disk: what a person types, and the one line that refuses it."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.clients import refused
from tests.support.patience import PATIENCE_S
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = pytest.mark.interop

MIB = 1 << 20
SIZE = 16 * MIB


def serve(work: Path, *argv: str) -> ServerProcess:
    """Serve as typed in `work`; the export is called `d`."""
    socket, control = work / "d.sock", work / "control.sock"
    names = ["--name", "d", "--listen", f"unix:{socket}", "--control", str(control)]
    return ServerProcess([NBDTARGET, *argv, *names], sockets=[socket], log=work / "log")


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in ("o", "oo", "A", "B"):
        (tmp_path / name).write_bytes(os.urandom(SIZE))
    return tmp_path


@pytest.mark.long
def test_cache_of_another_origin_is_refused_and_the_right_one_goes_on(
    work: Path,
) -> None:
    line = ["cache", "o", "f", "--cache-size", "4M", "--mode", "writeback"]
    line += ["--migration-rate", "1"]  # so that the blocks stay dirty
    with serve(work, *line) as server:
        with PlainClient(work / "d.sock", "d") as client:
            client.write(0, b"w" * MIB)
            client.flush()
        assert server.terminate() == 0
    before = (work / "oo").read_bytes()
    wrong = ["cache", "oo", "f", "--mode", "writeback"]
    told = refused([NBDTARGET, *wrong, "--control", "c.sock"])
    assert f"{work}/oo is not the origin" in told
    assert f"{work}/o:" in told
    told = refused([NBDTARGET, "metadata", "writeback", "f.nbdtarget", "f", "oo"])
    assert f"{work}/oo is not the origin" in told
    assert (work / "oo").read_bytes() == before
    told = subprocess.run(
        [NBDTARGET, "metadata", "info", "--json", "f.nbdtarget"],
        capture_output=True,
        check=True,
        text=True,
    ).stdout
    names = {each["role"]: each["name"] for each in json.loads(told)["disks"]}
    assert names == {"cache": f"{work}/f", "origin": f"{work}/o"}
    right = [NBDTARGET, "metadata", "writeback", "f.nbdtarget", "f", "o"]
    subprocess.run(right, check=True, capture_output=True)
    assert (work / "o").read_bytes()[:MIB] == b"w" * MIB


def test_clone_of_another_source_and_into_a_blank_file_is_refused(work: Path) -> None:
    with (
        serve(work, "clone", "A", "dd", "--hydration-rate", "1M") as server,
        PlainClient(work / "d.sock", "d") as client,
    ):
        client.write(0, b"w" * MIB)
        client.flush()
        server.terminate()
    before = (work / "dd").read_bytes()
    told = refused([NBDTARGET, "clone", "B", "dd", "--control", "c.sock"])
    assert f"{work}/B is not the source" in told
    assert f"{work}/A" in told
    assert (work / "dd").read_bytes() == before
    shutil.move(work / "dd", work / "kept")
    with (work / "dd").open("wb") as file:
        file.truncate(SIZE)
    told = refused([NBDTARGET, "clone", "A", "dd", "--control", "c.sock"])
    assert f"{work}/dd is not the destination" in told
    shutil.move(work / "kept", work / "dd")
    exits = [NBDTARGET, "clone", "A", "dd", "--exit-when-hydrated"]
    exits += ["--control", "c.sock", "--listen", f"unix:{work}/e.sock"]
    subprocess.run(exits, check=True, capture_output=True, timeout=PATIENCE_S)
    assert (work / "dd").read_bytes() == b"w" * MIB + (work / "A").read_bytes()[MIB:]
