# SPDX-License-Identifier: Apache-2.0
"""The findings of `examine`, on this machine and where something is missing."""

import os
import resource
import shutil
from pathlib import Path

import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.fast import compiled
from nbdtarget.tools import doctor
from nbdtarget.tools.doctor import Finding, examine


def found(folder: Path) -> dict[str, Finding]:
    answer = examine(str(folder))
    assert len({each.what for each in answer.findings}) == len(answer.findings)
    return {each.what: each for each in answer.findings}


def test_each_finding_says_what_it_is_for_and_what_to_do(tmp_path: Path) -> None:
    for each in found(tmp_path).values():
        assert each.detail
        assert each.needed_for
        if each.about not in ("clients", "packages"):  # their advice is their name
            assert (each.advice == "") == (each.state == "yes"), each


def test_nothing_is_left_in_the_folder(tmp_path: Path) -> None:
    examine(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_compiled_code_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "IS_COMPILED", False)
    findings = found(tmp_path)
    assert findings["compiled fast path"].state == "no"
    assert findings["io_uring"].state == "no"
    monkeypatch.setattr(compiled, "IS_COMPILED", True)
    monkeypatch.setattr(compiled, "is_available", lambda: True)
    findings = found(tmp_path)
    assert findings["compiled fast path"].state == findings["io_uring"].state == "yes"


def test_programs_and_packages_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "nbdinfo").write_text("#!/bin/sh\n")
    (tmp_path / "nbdinfo").chmod(0o755)
    real = shutil.which

    def which(program: str, path: str | None = None) -> str | None:
        return real(program, path=str(tmp_path))

    monkeypatch.setattr(shutil, "which", which)
    monkeypatch.setitem(doctor.PACKAGES, "there_is.no_such_package", "nothing")
    monkeypatch.setitem(doctor.PACKAGES, "msgspec", "records")
    findings = found(tmp_path)
    assert findings["nbdinfo"].state == "yes"
    assert findings["nbdinfo"].detail == str(tmp_path / "nbdinfo")
    assert findings["nbdcopy"].state == "no"
    assert findings["msgspec"].state == "yes"
    assert findings["there_is.no_such_package"].state == "no"


@pytest.mark.parametrize(
    ("hard", "state"), [(64, "no"), (1 << 16, "yes"), (resource.RLIM_INFINITY, "yes")]
)
def test_few_open_files_are_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hard: int, state: str
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda which: (32, hard))
    assert found(tmp_path)["open files"].state == state


def test_a_runtime_directory_that_cannot_be_made_is_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.delenv("RUNTIME_DIRECTORY", raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert not examine(str(tmp_path)).has_trouble
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "file"))
    answer = examine(str(tmp_path))
    assert answer.has_trouble
    (trouble,) = [each for each in answer.findings if each.state == "trouble"]
    assert trouble.what == "runtime directory"
    assert str(tmp_path / "file") in trouble.detail


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NbdTargetError, match="a file cannot be made here: No such"):
        examine(str(tmp_path / "missing"))
