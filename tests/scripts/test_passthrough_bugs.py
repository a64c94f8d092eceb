# SPDX-License-Identifier: Apache-2.0
"""The script that reproduces the kernel's passthrough bugs notices a step with another result. CI runs all of its stories."""

from pathlib import Path

import pytest

from scripts.passthrough_bugs import Bench, Failed, tell

pytestmark = [pytest.mark.interop, pytest.mark.long]


def test_step_that_goes_otherwise_fails_the_story(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The story fails because a passthrough table is accepted that should be refused."""

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
