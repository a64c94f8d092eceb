# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget doctor`: what it prints, and its exit status."""

import json
from pathlib import Path

import pytest

from nbdtarget.cli.app import run

LINES_MAX = 60  # with everything missing; a usual machine takes about half


def test_it_prints_one_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("nbdtarget ")
    assert str(tmp_path) in said[0]
    assert len(said) < LINES_MAX
    assert [line for line in said if line.startswith("  + direct I/O")]
    headings = [line for line in said if not line.startswith(" ")][1:]
    assert headings == [
        "program:",
        "kernel:",
        "disks:",
        "limits:",
        "clients:",
        "packages:",
    ]


def test_programs_read_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["doctor", "--json", str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert {each["state"] for each in answer["findings"]} <= {"yes", "no"}
    assert answer["folder"] == str(tmp_path)


def test_trouble_is_the_exit_status(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    assert run(["doctor", str(tmp_path)]) == 1
    assert "  ! runtime directory" in capsys.readouterr().out


def test_a_missing_folder_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["doctor", str(tmp_path / "missing")]) == 1
    said = capsys.readouterr()
    assert said.out == ""
    assert len(said.err.splitlines()) == 1
