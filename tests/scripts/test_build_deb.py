# SPDX-License-Identifier: Apache-2.0
"""The files of the Debian package besides the program. `make deb-test` installs, updates and removes the package."""

import subprocess
import tomllib
from pathlib import Path

import pytest

from nbdtarget.config.file import parse
from nbdtarget.targets.registry import TARGET_TYPES
from scripts import build_deb

CONTRIB = build_deb.ROOT / "contrib"
SCRIPTS = sorted([*build_deb.DEBIAN.glob("p*"), build_deb.ROOT / "scripts/deb_test.sh"])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_can_be_read(script: Path) -> None:
    shell = "bash" if script.suffix == ".sh" else "sh"
    subprocess.run([shell, "-n", str(script)], check=True)


def test_a_purge_removes_only_empty_folders() -> None:
    lines = (build_deb.DEBIAN / "postrm").read_text().splitlines()
    removing = [line for line in lines if "rm" in line.split("#")[0].split()]
    assert removing == []
    assert any("rmdir --ignore-fail-on-non-empty" in line for line in lines)


def test_the_example_is_a_configuration_file_also_with_its_comments() -> None:
    text = (CONTRIB / "examples/disks.toml").read_text()
    devices = parse(text, "disks.toml", TARGET_TYPES).devices
    assert [device.name for device in devices] == ["disk"]
    examples = "\n".join(
        line.removeprefix("# ")
        for line in text.splitlines()
        if line.startswith(("# [", "# table", "[", "table"))
    )
    devices = parse(examples, "disks.toml", TARGET_TYPES).devices
    assert {device.specs[0].type_name for device in devices} == {
        "linear",
        "clone",
        "cache",
    }


def test_a_missing_manual_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(build_deb, "MAN", tmp_path)
    monkeypatch.setattr("shutil.which", lambda program: f"/usr/bin/{program}")
    with pytest.raises(build_deb.DebError, match="make docs"):
        build_deb.build_deb(tmp_path, "1-1")
    assert list(tmp_path.iterdir()) == []


def test_the_container_runs_a_python_that_the_project_supports() -> None:
    project = tomllib.loads((build_deb.ROOT / "pyproject.toml").read_text())["project"]
    lines = (CONTRIB / "Containerfile").read_text().splitlines()
    images = {line.split()[1] for line in lines if line.startswith("FROM ")}
    (image,) = images
    version = image.split(":")[1].split("-")[0]
    assert f"Programming Language :: Python :: {version}" in project["classifiers"]
