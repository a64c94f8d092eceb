# SPDX-License-Identifier: Apache-2.0
"""The table of `make torture`: its programs exist, and a result that is not expected is an error."""

import subprocess
import sys
from pathlib import Path

import pytest

from scripts import torture_databases
from scripts.torture_databases import Case, postgres_cases, sqlite_cases

# Makes the directory that `--output` names, as the command does.
FAKE = """\
#!{}
import pathlib, sys
record = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
printed, status = {!r}, {}
if printed:
    record.mkdir()
    (record / "case").touch()
print(printed, end="")
sys.exit(status)
"""


def test_each_database_has_cases_that_survive_and_that_do_not(tmp_path: Path) -> None:
    for cases in (sqlite_cases(tmp_path), postgres_cases(tmp_path)):
        assert {case.survives for case in cases} in ({True, False}, set())
    for script in ("commit.py", "check.py"):
        compile((tmp_path / script).read_text(), script, "exec")
    for path in tmp_path.glob("pg_*"):
        subprocess.run(["sh", "-n", str(path)], check=True)


@pytest.mark.parametrize(
    ("status", "printed", "survives", "is_expected"),
    [
        (0, "ok", True, True),
        (1, "FAILED\nreplay it: x", False, True),
        (0, "ok", False, False),
        (1, "FAILED\nreplay it: x", True, False),
        (1, "", False, False),  # it could not be tried
        (2, "usage", False, False),
    ],
)
def test_result_is_compared_with_what_is_expected(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    printed: str,
    *,
    survives: bool,
    is_expected: bool,
) -> None:
    fake = tmp_path / "nbdtarget"
    fake.write_text(FAKE.format(sys.executable, printed, status))
    fake.chmod(0o755)
    monkeypatch.setattr(torture_databases, "NBDTARGET", str(fake))
    records = tmp_path / "records"
    records.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(records))
    assert torture_databases._try(Case("c", [], survives), 1) is is_expected
    tells_how = "replay it" in capsys.readouterr().out
    assert tells_how == ("replay it" in printed and not is_expected)
    # One that was expected is removed; the other one is needed for a replay.
    nr_kept = len(list(records.glob("*/record/case")))
    assert nr_kept == (0 if is_expected or not printed else 1)
    assert len(list(records.iterdir())) == nr_kept
