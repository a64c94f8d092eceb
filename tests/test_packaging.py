# SPDX-License-Identifier: Apache-2.0
"""A wheel built from the tree installs and runs where there is nothing else of ours."""

import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import nbdtarget
from nbdtarget.fast import compiled

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    # Without isolation: the backend is in the lock file, and a test needs no network.
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation"]
    subprocess.run(
        [*command, "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sdist")
    command = [sys.executable, "-m", "build", "--sdist", "--no-isolation"]
    subprocess.run(
        [*command, "--outdir", str(out), str(ROOT)], check=True, capture_output=True
    )
    (built,) = out.glob("*.tar.gz")
    return built


def test_an_index_takes_wheel_and_sdist(wheel: Path, sdist: Path) -> None:
    for command in (
        ["twine", "check", "--strict", str(wheel), str(sdist)],
        ["check_wheel_contents", "--config", str(ROOT / "pyproject.toml"), str(wheel)],
    ):
        done = subprocess.run(
            [sys.executable, "-m", *command], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_sdist_holds_what_packagers_need(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "LICENSE",
        "CHANGELOG.md",
        "requirements.lock",
        "contrib/systemd/nbdtarget.service",
        "docs/conf.py",
        "nbdtarget/fast/nbdtarget_clock.h",
        "nbdtarget/fast/nbdtarget_counting.h",
        "nbdtarget/fast/nbdtarget_fast.pyx",
        "tests/test_packaging.py",
    } <= names
    fast = ROOT / "nbdtarget" / "fast"
    parts = {str(path.relative_to(ROOT)) for path in fast.rglob("*.pxi")}
    assert parts
    assert parts <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_wheel_holds_the_three_packages_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    info = f"nbdtarget-{nbdtarget.__version__}.dist-info"
    ours = {"nbdtarget", "nbdtarget_protocol", "nbdtarget_metadata", info}
    # With a C compiler also the extension modules, each one file.
    extensions = {top for top in tops if top.endswith(".so")}
    assert tops - extensions == ours
    names_of_modules = {name.partition(".")[0] for name in extensions}
    modules = {path.stem for path in (ROOT / "nbdtarget" / "fast").glob("*.pyx")}
    expected = modules if compiled.IS_COMPILED else set()
    assert names_of_modules == expected
    assert f"{info}/licenses/LICENSE" in names


def test_wheel_tells_type_checkers_that_it_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    for package in ("nbdtarget", "nbdtarget_protocol", "nbdtarget_metadata"):
        assert f"{package}/py.typed" in names


def test_project_says_what_it_is_and_names_no_person() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {"nbd", "device-mapper"} <= set(project["keywords"])
    assert project["authors"] == [{"name": "The nbdtarget authors"}]
    assert "Typing :: Typed" in project["classifiers"]


def test_wheel_runs_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    (packages,) = home.glob("lib/python*/site-packages")
    # The dependencies come from here; a .pth inside a .pth directory is not read, so the
    # development environment's own link to this tree does not leak in.
    ours = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "dependencies.pth").write_text(f"{ours}\n")
    install = [sys.executable, "-m", "pip", f"--python={home}/bin/python", "install"]
    options = ["--quiet", "--no-deps", "--no-index", "--disable-pip-version-check"]
    subprocess.run([*install, *options, str(wheel)], check=True)
    done = subprocess.run(
        [str(home / "bin" / "nbdtarget"), "version"],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert nbdtarget.__version__ in done.stdout


def test_version_is_the_same_in_code_and_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == nbdtarget.__version__
