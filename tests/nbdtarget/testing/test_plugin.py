# SPDX-License-Identifier: Apache-2.0
"""The plugin in a test session of its own, as a user has it, under pytest-xdist."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.support.places import ROOT

SUITE = """
import nbdtarget
import pytest
from nbdtarget.testing import factories

big_disk = factories.powercut_disk(size="1G", tear_size=4096)


@pytest.mark.parametrize("nr", range(3))
def test_every_test_has_a_fresh_disk(powercut_disk, nr):
    with powercut_disk.connect() as client:
        assert client.size == 2 << 20
        assert client.read(0, 512) == bytes(512)
        client.write(0, b"x" * 512)
        powercut_disk.power_cut()
        assert client.read(0, 512) == bytes(512)
        client.write(0, b"x" * 512, fua=True)


def test_disks_of_factories(big_disk, slow_disk, flaky_disk, nbd_server):
    assert big_disk.table().endswith("2 tear_size 4096")
    assert slow_disk.table().split()[2] == "delay"
    flaky_disk.fail()
    with flaky_disk.connect() as client, pytest.raises(nbdtarget.NbdError):
        client.read(0, 512)
    names = {disk.name for disk in nbd_server.disks()}
    assert names >= {big_disk.name, slow_disk.name, flaky_disk.name}


def test_clones(clone_of, tmp_path):
    image = tmp_path / "golden.img"
    image.write_bytes(b"g" * 65536)
    one, two = clone_of(image), clone_of(image, name="two")
    with one.connect() as client:
        client.write(0, b"w")
    with two.connect() as client:
        assert client.read(0, 2) == b"gg"


@pytest.mark.parametrize("nr", range(2))
def test_scratch_disk_is_pristine_in_each_test(scratch_disk, nr):
    with scratch_disk.connect() as client:
        assert client.read(0, 2) == b"ii"
        client.write(0, b"w")


def test_client_that_is_left_attached_is_no_error(powercut_disk):
    global left_attached
    left_attached = powercut_disk.connect()


def test_disk_that_cannot_be_a_file(powercut_disk, nbd_file, monkeypatch):
    monkeypatch.setenv("PATH", "")
    nbd_file(powercut_disk, via="nbdfuse")
"""


def run(tmp_path: Path, suite: str, *arguments: str) -> str:
    (tmp_path / "test_it.py").write_text(suite)
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\nnbdtarget_disk_size = 2M\nnbdtarget_image = image.img\n"
    )
    (tmp_path / "image.img").write_bytes(b"i" * 4096)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "nbdtarget.testing.plugin"]
    quiet = ["-p", "no:cacheprovider", "-p", "no:asyncio", "-W", "error"]
    done = subprocess.run(
        [*command, *quiet, *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    return done.stdout + done.stderr


@pytest.mark.long
def test_fixtures_under_xdist(tmp_path: Path) -> None:
    printed = run(tmp_path, SUITE, "-rs", "-n", "2")
    assert "8 passed, 1 skipped" in printed
    assert "nbdfuse: not installed: nbdfuse, fusermount3" in printed


def test_plugin_imports_nothing_heavy() -> None:
    code = (
        "import sys, pytest; before = set(sys.modules); import nbdtarget.testing.plugin;"
        " print(sorted(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    ours = ["nbdtarget", "nbdtarget.testing", "nbdtarget.testing.factories"]
    assert done.stdout.strip() == str([*ours, "nbdtarget.testing.plugin"])


def test_entry_point_names_the_plugin() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    points = project["entry-points"]["pytest11"]
    assert points == {"nbdtarget": "nbdtarget.testing.plugin"}


@pytest.mark.parametrize(
    "option", ["nbdtarget_disk_size", "nbdtarget_control", "nbdtarget_image"]
)
def test_settings_are_on_the_page(option: str) -> None:
    assert f"`{option}`" in (ROOT / "docs/how-to/pytest.md").read_text()
