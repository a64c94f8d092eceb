# SPDX-License-Identifier: Apache-2.0
"""A look by another program: what it prints, and that it is bounded."""

import os
import resource
from pathlib import Path

import pytest

from nbdtarget.common.errors import ResolveError
from nbdtarget.devices.helper import look as module
from nbdtarget.devices.helper.look import look


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file that can be made a program called `viewer`."""
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return tmp_path / "viewer"


def write(program: Path, script: str) -> None:
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)


@pytest.mark.parametrize(
    ("script", "reason"),
    [
        ("echo '['; exit 0", "did not print what it should"),
        ("echo 'viewer: it is broken' >&2; echo more >&2; exit 1", "d: it is broken"),
        ("exit 3", "`viewer at' ended with status 3"),
        ("head -c 3000000 /dev/zero", "did not print what it should"),
        ("sleep 600", "`viewer at' did not end within"),
    ],
    ids=["cut", "error", "silent", "flood", "hangs"],
)
async def test_look_is_bounded(
    program: Path, monkeypatch: pytest.MonkeyPatch, script: str, reason: str
) -> None:
    write(program, script)
    if "sleep" in script:
        monkeypatch.setattr(module, "LOOK_S_MAX", 0.5)
    with pytest.raises(ResolveError, match=reason) as caught:
        await look("d", ("viewer", "at"), "viewer at")
    assert "\n" not in str(caught.value)


async def test_it_gets_its_arguments_bounds_and_descriptors(program: Path) -> None:
    reading, writing = os.pipe()
    os.write(writing, b"ok")
    write(
        program,
        f"""printf '{{"words": "%s", "cpu": "%s", "memory": "%s", "read": "%s"}}' "$*" $(ulimit -t) $(ulimit -v) $(head -c 2 /proc/self/fd/{reading})""",
    )
    found = await look(
        "d", ("viewer", "; x", "$y"), "v", fds=(reading,), memory=1 << 30
    )
    for fd in (reading, writing):
        os.close(fd)
    assert found == {
        "words": "; x $y",
        "cpu": str(module.CPU_S),
        "memory": str((1 << 30) // 1024),
        "read": "ok",
    }
    assert resource.getrlimit(resource.RLIMIT_CPU)[0] != module.CPU_S


async def test_no_more_is_kept_than_the_bound(
    program: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(program, """echo '{"words": "many of them"}'""")
    assert await look("d", ("viewer",), "viewer") == {"words": "many of them"}
    monkeypatch.setattr(module, "OUTPUT_MAX", 20)
    with pytest.raises(ResolveError, match="did not print what it should"):
        await look("d", ("viewer",), "viewer")


async def test_program_that_is_missing() -> None:
    with pytest.raises(ResolveError, match="the program no-such is not there"):
        await look("d", ("no-such",), "no-such")
