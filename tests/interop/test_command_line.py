# SPDX-License-Identifier: Apache-2.0
"""Bad input: one clear line, status 1 or 2, and no file touched."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from tests.support.clients import MIB, CloneUnderTest, refused
from tests.support.plain_client import PlainClient
from tests.support.processes import NBDTARGET, ServerProcess

pytestmark = pytest.mark.interop


def files(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.is_file()}


def test_missing_source_is_named(clone: CloneUnderTest, tmp_path: Path) -> None:
    before = files(tmp_path)
    clone.source = str(tmp_path / "nowhere.img")
    assert "nowhere.img" in refused(clone.argv())
    assert files(tmp_path) == before


def test_source_server_that_is_not_there_is_named(
    clone: CloneUnderTest, tmp_path: Path
) -> None:
    before = files(tmp_path)
    clone.source = f"nbd+unix:///?socket={tmp_path}/nobody.sock"
    assert "nobody.sock" in refused(clone.argv())
    assert files(tmp_path) == before


def test_small_destination_is_refused(clone: CloneUnderTest, tmp_path: Path) -> None:
    clone.dest.write_bytes(bytes(1 * MIB))
    before = files(tmp_path)
    assert "small" in refused(clone.argv()).lower()
    assert files(tmp_path) == before


def test_foreign_metadata_is_refused(clone: CloneUnderTest, tmp_path: Path) -> None:
    clone.dest.write_bytes(bytes(len(clone.content)))
    clone.metadata.write_bytes(b"somebody's letters\n" * 100_000)
    before = files(tmp_path)
    assert "metadata" in refused(clone.argv())
    assert files(tmp_path) == before


def test_other_region_size_is_refused(clone: CloneUnderTest, tmp_path: Path) -> None:
    with (
        clone.serve("--region-size", "64K", "--no-hydration"),
        PlainClient(clone.socket, "disk") as client,
    ):
        client.read(0, 512)  # told to stop before that, it would leave nothing behind
    before = {**files(tmp_path), "log": b""}
    assert refused(clone.argv("--region-size", "4K"))
    assert {**files(tmp_path), "log": b""} == before


def test_second_server_on_one_destination_is_refused(
    clone: CloneUnderTest, served: ServerProcess, tmp_path: Path
) -> None:
    second = [NBDTARGET, "clone", clone.source, str(clone.dest)]
    second += ["--metadata", str(tmp_path / "other"), "--listen"]
    line = refused([*second, f"unix:{tmp_path}/other.sock"])
    assert str(clone.dest) in line
    assert not (tmp_path / "other").exists()


def test_bad_table_line_is_refused_in_the_kernels_words(tmp_path: Path) -> None:
    control = tmp_path / "control.sock"
    argv = [NBDTARGET, "serve", "--listen", f"unix:{tmp_path}/nbd.sock"]
    with ServerProcess(
        [*argv, "--control", str(control)], sockets=[control], log=tmp_path / "log"
    ):
        for table, text in (
            ("0 2048 nonesuch", "nonesuch"),
            ("0 2048 clone a b", "clone: Invalid number of arguments"),
        ):
            create = [NBDTARGET, "create", "bad", "--table", table]
            assert text in refused(create, NBDTARGET_CONTROL=str(control))
        listing = subprocess.run(
            [NBDTARGET, "ls"],
            env={**os.environ, "NBDTARGET_CONTROL": str(control)},
            capture_output=True,
            text=True,
        )
        assert "bad" not in listing.stdout


@pytest.mark.parametrize(
    "words", [["clone"], ["--nonesuch"], ["clone", "a", "b", "--x"]]
)
def test_usage_error_is_status_2(words: list[str]) -> None:
    done = subprocess.run([NBDTARGET, *words], capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr


def test_sigint_ends_it_as_sigterm_does(clone: CloneUnderTest) -> None:
    process = clone.start()
    process.signal(signal.SIGINT)
    assert process.wait() == 0
    assert not os.path.lexists(clone.socket)
