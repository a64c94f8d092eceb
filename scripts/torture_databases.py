# SPDX-License-Identifier: Apache-2.0
"""`make torture`: databases under power cuts, those that keep their promises and those that are told not to.

SQLite with the programs of docs/how-to/torture.md, in its journal modes; PostgreSQL of Debian, if it is installed. Each is
tried by `nbdtarget torture`, and must pass or be caught as the table here says. It takes root, and some minutes.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Final, NamedTuple

__all__ = ["main"]

ROOT: Final = Path(__file__).resolve().parent.parent
NBDTARGET: Final = str(Path(sys.executable).with_name("nbdtarget"))
PROGRAMS: Final = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
REPLAYS: Final = ("replay it: ", "its disk: ")  # lines of `nbdtarget torture`
POSTGRES: Final = Path("/usr/lib/postgresql")

# Each script begins with this. A server that was killed leaves its pid file behind.
PG_HEAD: Final = """\
set -eu
as() { setpriv --reuid=postgres --regid=postgres --clear-groups "$@"; }
start() { rm -f data/postmaster.pid; as BIN/pg_ctl -D data -w -t 30 -l data/log -o "-k $PWD/data -c listen_addresses= -c fsync=$1" start >/dev/null; }
sql() { as BIN/psql -qtAX -h "$PWD/data" -d postgres -c "$1"; }
stop() { as BIN/pg_ctl -D data -m immediate stop >/dev/null; }
"""
PG_SETUP: Final = """\
mkdir data; chown postgres: data
as BIN/initdb -D data -A trust --no-sync >/dev/null
start on; sql 'create table rows (n integer primary key, data text)'; as BIN/pg_ctl -D data stop >/dev/null
"""
PG_COMMIT: Final = """\
start "$1"
n=0; while [ $n -lt 20 ]; do sql "insert into rows values ($n, repeat('x', 700))"; echo $n; n=$((n+1)); done
stop
"""
PG_CHECK: Final = """\
start on || { tail -3 data/log; exit 1; }
sql 'select n from rows order by n' >found; stop
sort "$TORTURE_ACKNOWLEDGED" >promised; sort found >there
missing=$(comm -23 promised there | tr '\\n' ' ')
[ -z "$missing" ] || { echo "acknowledged, and not there: $missing"; exit 1; }
"""


class Case(NamedTuple):
    """One row of the table. `options`: for `nbdtarget torture`, up to the program."""

    name: str
    options: list[str]
    survives: bool


def sqlite_cases(work: Path) -> list[Case]:
    page = (ROOT / "docs/how-to/torture.md").read_text()
    program, check = PROGRAMS.findall(page)
    (work / "commit.py").write_text(program)
    (work / "check.py").write_text(check)
    modes = {
        ("delete", "full"): False,  # the directory is not synced: SQLite says so
        ("delete", "extra"): True,
        ("delete", "off"): False,
        ("truncate", "full"): True,
        ("persist", "full"): True,
        ("wal", "full"): True,
        ("wal", "normal"): False,
        ("wal", "off"): False,
    }
    options = ["--check", f"{sys.executable} {work}/check.py", "--"]
    return [
        Case(
            f"sqlite {' '.join(mode)}",
            [*options, sys.executable, str(work / "commit.py"), *mode],
            survives,
        )
        for mode, survives in modes.items()
    ]


def postgres_cases(work: Path) -> list[Case]:
    """Those of the newest PostgreSQL; none, if there is none."""
    found = sorted(POSTGRES.glob("*/bin/initdb"))
    if not found or shutil.which("setpriv") is None:
        print("PostgreSQL is not installed (Debian: postgresql): it is left out")
        return []
    scripts = {"setup": PG_SETUP, "commit": PG_COMMIT, "check": PG_CHECK}
    for name, text in scripts.items():
        script = (PG_HEAD + text).replace("BIN/", f"{found[-1].parent}/")
        (work / f"pg_{name}").write_text(script)
    options = ["--size", "256M", "--setup", f"sh {work}/pg_setup"]
    options += ["--check", f"sh {work}/pg_check", "--", "sh", f"{work}/pg_commit"]
    return [
        Case(f"postgresql fsync={fsync}", [*options, fsync], fsync == "on")
        for fsync in ("on", "off")
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--cuts", type=int, default=60, help="power cuts of each")
    parser.add_argument("--only", default="", help="those whose name contains this")
    arguments = parser.parse_args()
    nr_wrong = 0
    with tempfile.TemporaryDirectory() as directory:
        work = Path(directory)
        work.chmod(0o755)
        for case in [*sqlite_cases(work), *postgres_cases(work)]:
            if arguments.only in case.name:
                nr_wrong += not _try(case, arguments.cuts)
    return 1 if nr_wrong else 0


def _try(case: Case, nr_cuts: int) -> bool:
    """Try a case and print what came of it. Returns whether that was expected; if not, the record is kept for a replay."""
    place = Path(tempfile.mkdtemp(prefix="torture-"))
    place.chmod(0o711)  # PostgreSQL runs as another user
    record = place / "record"
    command = [NBDTARGET, "torture", "--cuts", str(nr_cuts), "--output", str(record)]
    is_expected = False
    try:
        done = subprocess.run([*command, *case.options], capture_output=True, text=True)
        is_expected = _tell(case, done)
    finally:
        if is_expected or not record.exists():
            shutil.rmtree(place)
    return is_expected


def _tell(case: Case, done: "subprocess.CompletedProcess[str]") -> bool:
    """Print what came of it. Returns whether that was expected."""
    if done.returncode not in (0, 1) or not done.stdout:
        print(f"{case.name}: cannot be tried: {done.stderr.strip()}")
        return False
    survives = done.returncode == 0
    is_expected = survives == case.survives
    verdict = "survives" if survives else "LOSES"
    print(f"{case.name:24} {verdict:9} {'' if is_expected else 'NOT AS EXPECTED'}")
    lines = done.stdout.splitlines()[: 1 if survives else None]
    # There is nothing to replay where the record is removed.
    kept = [line for line in lines if not (is_expected and line.startswith(REPLAYS))]
    print(*(f"    {line}" for line in kept), sep="\n")
    return is_expected


if __name__ == "__main__":
    sys.exit(main())
