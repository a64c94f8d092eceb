# SPDX-License-Identifier: Apache-2.0
"""`make vm-test`: what it would run. That it runs is shown by running it."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from scripts import vm_test
from scripts.vm import image as image_module
from scripts.vm import machine
from scripts.vm.image import ImageError, PackagesError

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


@pytest.mark.parametrize(
    ("error", "status"), [(PackagesError("x"), 0), (ImageError("x"), "vm-test: x")]
)
def test_only_an_archive_that_does_not_answer_is_no_failure(
    error: ImageError,
    status: int | str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail() -> None:
        raise error

    monkeypatch.setattr(vm_test, "has_kvm", lambda: True)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(vm_test, "image", fail)
    if status:
        with pytest.raises(SystemExit, match=str(status)):
            vm_test.main(["--with-kvm-only"])
    else:
        assert vm_test.main(["--with-kvm-only"]) == 0
        said = capsys.readouterr().out
        assert said == "skipping the tests in virtual machines: x\n"


def test_packages_are_fetched_again_when_that_has_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_module, "FETCH_PAUSES_S", (0, 0))
    once = tmp_path / "once"
    image_module._fetch("sh", "-c", f"rm {once} || {{ touch {once}; false; }}")
    with pytest.raises(PackagesError, match="exit 7"):
        image_module._fetch("sh", "-c", "exit 7")


def test_an_unknown_test_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        vm_test.main(["--only", "nothing"])
    assert "no test nothing" in capsys.readouterr().err


def test_disks_leave_the_first_place_to_the_kernel() -> None:
    """QEMU ends at once if two are to be the first."""
    words = machine._command(["-kernel", "k"], ["a", "b"], None, Path("console"))
    disks = [word for word in words if word.startswith("virtio-blk-pci")]
    assert [disk.partition("bootindex=")[2] for disk in disks] == ["1", "2"]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_relay_copies_both_ways(tmp_path: Path, kind: str) -> None:
    family = socket.AF_INET if kind == "tcp" else socket.AF_UNIX
    with socket.socket(family) as listening:
        listening.bind(("127.0.0.1", 0) if kind == "tcp" else str(tmp_path / "s"))
        listening.listen()
        name = listening.getsockname()
        where = f"{name[0]}:{name[1]}" if kind == "tcp" else name
        with socket.create_server(("127.0.0.1", 0)) as guests:
            guest = socket.create_connection(guests.getsockname())
            passed, _ = guests.accept()
        argv = [sys.executable, "-I", str(machine.RELAY), where]
        relay = subprocess.Popen(argv, stdin=passed.fileno())
        passed.close()
        server, _ = listening.accept()
        with relay, guest, server:
            guest.sendall(b"request")
            assert server.recv(7, socket.MSG_WAITALL) == b"request"
            server.sendall(b"reply")
            assert guest.recv(5, socket.MSG_WAITALL) == b"reply"


def conversation(text: str) -> tuple[int | None, list[str], list[str]]:
    """Talk to a guest that prints `text`. Returns its status, the lines shown, and the requests of the guest."""
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
