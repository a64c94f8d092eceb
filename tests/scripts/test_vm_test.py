# SPDX-License-Identifier: Apache-2.0
"""`make vm-test`: what it would run. That it runs is shown by running it."""

import subprocess
from pathlib import Path

import pytest

from scripts import vm_test
from scripts.vm import machine

SCRIPTS = sorted([*vm_test.SCRIPTS.glob("*.sh"), machine.COMMON])


def test_each_test_has_its_script_and_each_script_its_test() -> None:
    names = {test.name for test in vm_test.TESTS}
    assert names == {script.stem for script in vm_test.SCRIPTS.glob("*.sh")}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_can_be_read_by_bash(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_it_is_skipped_by_name_without_kvm(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vm_test, "has_kvm", lambda: False)
    assert vm_test.main(["--with-kvm-only"]) == 0
    assert capsys.readouterr().out.startswith("skipping the tests in virtual machines")


def test_an_unknown_test_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vm_test.main(["--only", "nothing"])
    assert "no test nothing" in capsys.readouterr().err


def conversation(text: str) -> tuple[int | None, list[str], list[str]]:
    """What comes of a guest that prints `text`: the status, what was shown, what was asked for."""
    guest = subprocess.Popen(
        ["printf", "%s", text],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    shown: list[str] = []
    asked: list[str] = []
    with guest:
        status = machine._converse(guest, asked.append, shown.append)
    return status, shown, asked


def test_lines_of_a_guest_are_told_apart() -> None:
    status, shown, asked = conversation("one\r\nVM-EXIT:3\r\ntwo\r\n")
    assert (status, shown, asked) == (3, ["one", "two"], [])


def test_a_guest_that_ends_early_has_no_status() -> None:
    assert conversation("one\n") == (None, ["one"], [])
