# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget advise`: the table, the conclusion, and what it refuses."""

import json
import random
from pathlib import Path

import pytest

from tests.support.command_line import CommandLine


@pytest.fixture
def trace(tmp_path: Path) -> str:
    rng = random.Random(3)
    lines = [
        f"{rng.choice('RRW')},{rng.randrange(64) * 65536},4096" for _ in range(4000)
    ]
    path = tmp_path / "trace.csv"
    path.write_text("\n".join(lines))
    return str(path)


def test_a_table_and_what_is_enough(cli: CommandLine, trace: str) -> None:
    sizes = [word for size in ("1M", "4M", "8M") for word in ("--cache-size", size)]
    said = cli("advise", trace, *sizes)
    head, small, fits, _, _, about, conclusion = said.splitlines()
    assert head.split() == ["cache", "smq", "LRU", "best", "possible"]
    assert small.split()[:2] == ["1.0", "MiB"]
    assert fits.split()[-1] == "100.0%"
    assert about.startswith("4,000 accesses of 4.0 MiB, 3")
    assert about.endswith("the last 2,000 are counted.")
    assert conclusion.startswith("More than 4.0 MiB stops to help: ")
    said = cli("advise", trace, "--cache-size", "1M", "--cache-size", "2M")
    assert said.splitlines()[-1].startswith("Each larger cache has more hits")


def test_what_is_used_once(cli: CommandLine, tmp_path: Path) -> None:
    path = tmp_path / "once"
    path.write_text("\n".join(str(nr) for nr in range(100)))
    assert "A cache does not help" in cli("advise", str(path))


def test_json_and_a_picture(cli: CommandLine, trace: str, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "p.svg"
    said = cli(
        "advise", trace, "--json", "--cache-size", "4M", "--picture", str(picture)
    )
    answer = json.loads(said)
    assert answer["enough"] == 4 << 20
    assert answer["rows"][0].keys() == {"size", "policy", "lru", "best"}
    assert picture.read_text().startswith("<?xml")


@pytest.mark.long
def test_other_policies_and_block_sizes(cli: CommandLine, trace: str) -> None:
    said = cli(
        "advise", trace, "--policy", "mq", "--block-size", "32K", "--warm-up", "0"
    )
    assert "mq" in said.splitlines()[0]
    assert "the last 4,000 are counted" in said


@pytest.mark.parametrize(
    ("words", "status", "reason"),
    [
        (["--picture", "a.gif"], 2, "neither .png nor .svg"),
        (["--format", "tar"], 2, "--format: 'tar' is none of plain, fio"),
        (["--policy", "arc"], 2, "--policy: 'arc' is none of"),
        (["--format", "msr"], 1, "trace.csv:1: not an access"),
        (["--cache-size", "64K"], 1, "less than 16 blocks"),
    ],
    ids=lambda value: value[0] + value[1] if isinstance(value, list) else "",
)
def test_what_is_refused(
    cli: CommandLine, trace: str, words: list[str], status: int, reason: str
) -> None:
    from nbdtarget.cli.app import run

    assert run(["advise", trace, *words]) == status
    out, err = cli._capsys.readouterr()
    assert reason in err
    assert err.count("\n") == 1
    assert out.count("\n") <= 1


def test_a_file_that_is_not_there(cli: CommandLine) -> None:
    assert "No such file or directory" in cli("advise", "/nonexistent/t", status=1)
