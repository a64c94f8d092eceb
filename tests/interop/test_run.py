# SPDX-License-Identifier: Apache-2.0
"""Servers that run as long as one client does: `--run`, and tools that start a server themselves."""

import subprocess
from pathlib import Path

import pytest

from tests.support.clients import CloneUnderTest, client, needs, refused
from tests.support.patience import PATIENCE_S
from tests.support.processes import NBDTARGET

pytestmark = [pytest.mark.interop, needs("nbdcopy", "nbdinfo")]


def test_nbdcopy_starts_a_clone_and_ends_it(
    clone: CloneUnderTest, tmp_path: Path
) -> None:
    copy = tmp_path / "copy.img"
    argv = (NBDTARGET, "clone", clone.source, str(clone.dest))
    client("nbdcopy", "--", "[", *argv, "]", str(copy))
    assert copy.read_bytes() == clone.content


@pytest.mark.parametrize("command", ["export", "clone"])
def test_output_of_a_tool_that_starts_a_server_is_its_own(
    clone: CloneUnderTest, command: str
) -> None:
    disks = [clone.source, str(clone.dest)][: 1 + (command == "clone")]
    argv = ["--", "[", NBDTARGET, command, *disks, "]"]
    size = subprocess.run(
        ["nbdinfo", "--size", *argv], capture_output=True, text=True, timeout=PATIENCE_S
    )
    assert size.stdout == f"{len(clone.content)}\n", size.stderr


def test_what_a_command_wrote_is_committed_when_the_server_has_ended(
    clone: CloneUnderTest, tmp_path: Path
) -> None:
    new = tmp_path / "new.img"
    new.write_bytes(bytes(len(clone.content)))
    copy_back = f'nbdcopy {new} "$uri" && nbdinfo --size "$uri"; exit 9'
    argv = clone.argv("--run", copy_back)
    done = subprocess.run(argv, capture_output=True, text=True, timeout=PATIENCE_S)
    assert (done.returncode, done.stdout) == (9, f"{len(clone.content)}\n")
    clone.hydrate()
    assert clone.dest.read_bytes() == new.read_bytes()


def test_a_command_cannot_be_combined_with_what_ends_or_prints(
    clone: CloneUnderTest,
) -> None:
    for other in ("--json", "--exit-when-hydrated"):
        said = refused(clone.argv("--run", "true", other))
        assert "--run cannot be combined with" in said
    assert not clone.dest.exists()
