# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget sources`: every scheme has a line, and what it lacks another one."""

import json
from pathlib import Path

import pytest

from nbdtarget.cli.app import run
from nbdtarget.devices.registry import SCHEMES


def test_every_scheme_has_its_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    for scheme in SCHEMES.values():
        (line,) = [each for each in lines if each[2:].startswith(f"{scheme.syntax} ")]
        assert line.endswith(scheme.summary)
    assert [each for each in lines if each.startswith("+ PATH ")]


def test_what_is_missing_is_named_with_its_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run(["sources", "--json"]) == 0
    told = {each["name"]: each for each in json.loads(capsys.readouterr().out)}
    qemu = told["qemu:FORMAT:IMAGE"]
    assert qemu["needs"] == ["qemu-nbd", "qemu-img"]
    assert "`apt install qemu-utils'" in qemu["missing"][0]
    assert qemu["is_read_only"]
    assert told["PATH"]["missing"] == []
    assert not told["PATH"]["is_read_only"]
    assert run(["sources"]) == 0
    lines = capsys.readouterr().out.splitlines()
    (at,) = [nr for nr, line in enumerate(lines) if line.startswith("- nbdkit:")]
    assert "`apt install nbdkit'" in lines[at + 1]
