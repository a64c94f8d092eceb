# SPDX-License-Identifier: Apache-2.0
"""The kernel's two passthrough bugs, by its own steps, are none of ours."""

from pathlib import Path

import pytest

from scripts.passthrough_bugs import Bench, Failed, main, tell

pytestmark = pytest.mark.interop


@pytest.mark.slow
def test_no_story_of_the_kernels_bugs_comes_true(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[-3:] == [
        "unclean shutdown: no data can be lost",
        "preloaded table: no data can be lost",
        "dirty_log: no data can be lost",
    ]
    assert said.count("$ kill -9 $!") == 3
    assert list(tmp_path.iterdir()) == []


def test_step_that_goes_otherwise_fails_the_story(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A passthrough table that is accepted, where it should be refused."""

    def story(bench: Bench) -> None:
        bench.start()
        bench.create_parts()
        bench.refused("anything", "create", "cache", "--table", bench.writeback)

    reason = tell(story, Bench(tmp_path))
    assert reason.endswith(": accepted")
    assert "# FAILED" in capsys.readouterr().out


def test_refusal_for_another_reason_is_not_taken_for_the_one(tmp_path: Path) -> None:
    bench = Bench(tmp_path)
    bench.start()
    try:
        with pytest.raises(Failed, match="and not: unable to resume"):
            bench.refused("unable to resume", "create", "c", "--table", "0 8 nonsense")
    finally:
        bench.stop()
