# SPDX-License-Identifier: Apache-2.0
"""The files for GitHub: the CI workflow fits the project, and the templates name commands and files that exist."""

import re
import tomllib

from tests.support.reference_pages import ROOT

WORKFLOW = (ROOT / ".github/workflows/ci.yml").read_text()
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
TEMPLATES = sorted((ROOT / ".github").rglob("*.*"))


def test_workflow_runs_each_supported_python() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    claimed = re.findall(r"Python :: (3\.\d+)", " ".join(project["classifiers"]))
    (line,) = re.findall(r"python: \[(.*)\]", WORKFLOW)
    run = line.replace('"', "").split(", ")
    assert run == ["3.11", "3.12", "3.13", "3.14"]
    assert set(claimed) <= set(run)
    assert project["requires-python"] == f">={run[0]}"


def test_workflow_runs_what_the_gate_runs() -> None:
    gate = (ROOT / ".ci/run").read_text()
    command = re.compile(r"make (?:--no-print-directory )?([a-z-]+)")
    assert set(command.findall(WORKFLOW)) == set(command.findall(gate))


def test_templates_name_targets_of_make_that_exist() -> None:
    named = {
        name
        for path in TEMPLATES
        for name in re.findall(
            r"(?:`|: |placeholder: )make ([a-z-]+)", path.read_text()
        )
    }
    assert {"check", "test", "sim", "docs-reference"} <= named
    assert sorted(named - TARGETS) == []


def test_templates_name_files_that_exist() -> None:
    named = {
        name
        for path in TEMPLATES
        for name in re.findall(r"\b([A-Z]+\.md|docs/[a-z/]+)", path.read_text())
    }
    assert {"SECURITY.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/reference"} <= named
    assert sorted(name for name in named if not (ROOT / name).exists()) == []
