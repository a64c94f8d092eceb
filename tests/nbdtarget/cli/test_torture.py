# SPDX-License-Identifier: Apache-2.0
"""`nbdtarget torture`: its options, and what it prints."""

import json
from pathlib import Path

import pytest

from nbdtarget.cli import torture as command
from nbdtarget.cli.app import run
from nbdtarget.torture import session
from nbdtarget.torture.cuts import Cut
from nbdtarget.torture.recording import Recording
from nbdtarget.torture.session import Failure, Result, TortureOptions
from nbdtarget.torture.trials import Outcome

CUT = Cut.of(13, "all writes at risk are lost", {})
LOST = {22: [32842, 32843]} | {nr: [nr] for nr in range(30, 40)}
FAILURE = Failure(
    CUT,
    Outcome("the check ended with status 1", "row 0\nis lost\n"),
    1,
    3,
    LOST,
    Path("/r c/case-1.json"),
)
PASSED = Result(271, 133, 30, 200, 0.5, 12.25, None)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[TortureOptions]:
    asked: list[TortureOptions] = []

    def torture(options: TortureOptions, say: object) -> Result:
        asked.append(options)
        return PASSED if options.seed == 0 else PASSED._replace(failure=FAILURE)

    monkeypatch.setattr(session, "torture", torture)
    return asked


def test_options_reach_the_session(
    asked: list[TortureOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    given = [
        "--check",
        "c",
        "--setup",
        "s",
        "--fs",
        "xfs",
        "--size",
        "1G",
        "--cuts",
        "7",
    ]
    more = [
        "--every",
        "2",
        "--tear-size",
        "512",
        "--output",
        "/o",
        "--timeout",
        "1",
        "--check-timeout",
        "2",
    ]
    assert run(["torture", *given, *more, "--", "prog", "--flag"]) == 0
    assert asked == [
        TortureOptions(
            command=("prog", "--flag"),
            check="c",
            setup="s",
            file_system="xfs",
            size=1 << 30,
            nr_cuts=7,
            every=2,
            tear_size=512,
            output="/o",
            command_timeout_s=1,
            check_timeout_s=2,
        )
    ]
    assert capsys.readouterr().out.splitlines() == [
        "200 power cuts in 12.2 s, after a record of 271 writes, 133 flushes and 30 lines in 0.5 s",
        "after each of them the check has passed",
    ]


def test_failure_is_printed_with_its_replay(
    asked: list[TortureOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["torture", "--check", "c", "--seed", "1", "--", "prog"]) == 1
    shown = capsys.readouterr().out.splitlines()[1:]
    assert shown[:3] == [
        "FAILED: the power went before flush 13 of 133 had ended, with 1 lines acknowledged: all writes at risk are lost",
        "  of 3 writes at risk, it is enough to lose 11:",
        "    write 22: 2 sectors from 32842 on",
    ]
    assert shown[-6:] == [
        "    … and 3 more",
        "  the check ended with status 1",
        "    row 0",
        "    is lost",
        "replay it: nbdtarget torture --replay '/r c/case-1.json'",
        "its disk:  nbdtarget torture --replay '/r c/case-1.json' --image disk.img",
    ]


def test_json_has_the_figures_and_the_case(
    asked: list[TortureOptions], capfd: pytest.CaptureFixture[str]
) -> None:
    assert run(["torture", "--json", "--check", "c", "--seed", "1", "--", "p"]) == 1
    told = json.loads(capfd.readouterr().out)
    assert (told["writes"], told["cuts"]) == (271, 200)
    assert told["case"] == "/r c/case-1.json"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--check", "c"], "name the program"),
        (["--", "prog"], "say what tells right from wrong"),
        (["--image", "f", "--check", "c", "--", "prog"], "goes with --replay"),
        (["--size", "big", "--check", "c", "--", "prog"], "not a size"),
    ],
)
def test_wrong_usage_is_refused(
    asked: list[TortureOptions],
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(["torture", *arguments]) == 2
    assert said in capsys.readouterr().err
    assert asked == []


def test_replay_of_what_is_no_case_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["torture", "--replay", str(tmp_path / "case-1.json")]) == 1
    assert "it stands beside each case" in capsys.readouterr().err


def test_replay_prints_the_outcome(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recording = Recording(1, "ext4", ("prog", "a b"), "c", ())
    outcomes = iter([FAILURE.outcome, Outcome("", ""), None])
    monkeypatch.setattr(session, "replay", lambda *_: (recording, CUT, next(outcomes)))
    assert command._replay("case", None, 1) == 1
    assert command._replay("case", None, 1) == 0
    assert command._replay("case", "disk.img", 1) == 0
    shown = capsys.readouterr().out
    assert "prog 'a b': the power went before flush 13 had ended" in shown
    assert "the check has passed" in shown
    assert "disk.img: this is the disk, with ext4" in shown
