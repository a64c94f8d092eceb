# SPDX-License-Identifier: Apache-2.0
"""The units in contrib/systemd. That they work under a real systemd is shown by `make vm-test`."""

import re
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import pytest

from nbdtarget.daemon.stop_bounds import STOP_S_MAX
from tests.support.places import ROOT

NBDTARGET = [sys.executable, "-c", "from nbdtarget.cli.app import main; main()"]
UNITS = ROOT / "contrib" / "systemd"
SERVICES = sorted(UNITS.glob("*.service"))
# systemd's own measure of what a service may still do: 0 to 10. It was 3.3 with systemd 252, and must not grow.
EXPOSURE_MAX = 3.3

needs_systemd = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="there is no systemd-analyze"
)


def parsed(unit: Path) -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(unit.read_text())
    return parser


def test_there_are_units_for_a_server_a_clone_and_a_cache() -> None:
    names = {unit.name for unit in SERVICES}
    wanted = {
        "nbdtarget.service",
        "nbdtarget-clone@.service",
        "nbdtarget-cache@.service",
    }
    assert names == wanted
    assert (UNITS / "nbdtarget.socket").is_file()


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_units_leave_time_for_a_stop_and_wait_for_ready(unit: Path) -> None:
    service = parsed(unit)["Service"]
    assert service["Type"] == "notify"
    assert float(service["TimeoutStopSec"]) > STOP_S_MAX
    program, command, *words = service["ExecStart"].split()
    assert program == "nbdtarget", "systemd finds it in /usr/local/bin and in /usr/bin"
    known = subprocess.run(
        [*NBDTARGET, command, "--help"], check=True, capture_output=True, text=True
    ).stdout
    options = [word for word in words if word.startswith("--")]
    assert options
    assert all(option in known for option in options)


@pytest.mark.parametrize("unit", SERVICES, ids=lambda unit: unit.name)
def test_mounts_of_network_disks_come_after_the_server(unit: Path) -> None:
    section = parsed(unit)["Unit"]
    assert "remote-fs-pre.target" in section["Before"].split()
    assert "remote-fs-pre.target" in section["Wants"].split()


def test_all_services_are_hardened_alike() -> None:
    marker = "# Clients on this machine"
    hardening = {
        re.split(r"^\[Install\]", unit.read_text().split(marker)[1], flags=re.M)[0]
        for unit in SERVICES
    }
    assert len(hardening) == 1
    assert "NoNewPrivileges=yes" in hardening.pop()


def with_a_program_of_this_machine(folder: Path) -> list[str]:
    """Copies of the units whose program exists; a template gets an instance."""
    copies = []
    for unit in UNITS.iterdir():
        if unit.suffix in (".service", ".socket"):
            copy = folder / unit.name.replace("@.", "@web.")
            text = unit.read_text().replace(
                "ExecStart=nbdtarget", f"ExecStart={shutil.which('true')}"
            )
            copy.write_text(text)
            copies.append(str(copy))
    return sorted(copies)


@needs_systemd
def test_systemd_finds_no_fault(tmp_path: Path) -> None:
    copies = with_a_program_of_this_machine(tmp_path)
    assert len(copies) == len(SERVICES) + 1
    done = subprocess.run(
        ["systemd-analyze", "verify", "--man=no", *copies],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")


@needs_systemd
def test_what_services_may_do_does_not_grow(tmp_path: Path) -> None:
    copies = [
        copy
        for copy in with_a_program_of_this_machine(tmp_path)
        if copy.endswith(".service")
    ]
    done = subprocess.run(
        ["systemd-analyze", "security", "--offline=yes", "--no-pager", *copies],
        capture_output=True,
        text=True,
    )
    found = re.findall(r"exposure level for (\S+?):? ([\d.]+)", done.stdout)
    assert len(found) == len(SERVICES), done.stdout + done.stderr
    assert {name: level for name, level in found if float(level) > EXPOSURE_MAX} == {}
