# SPDX-License-Identifier: Apache-2.0
"""The messages of `clone` when it is stopped before all is copied, and after that."""

import pytest

from nbdtarget.cli.progress.clone import Reporter
from nbdtarget.cli.progress.common import Nowhere
from nbdtarget.porcelain.clone import CloneOptions

MIB = 1 << 20


def test_stop_says_how_much_is_copied_and_how_to_continue(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter(CloneOptions(source="a", dest="b"), Nowhere())
    reporter.progress(3 * MIB, 8 * MIB)
    reporter.stopping()
    reporter.stopping()
    assert capsys.readouterr().err.splitlines() == [
        "nbdtarget: stopped: 3 of 8 MiB are copied; run the same command again to continue"
    ]


def test_stop_of_a_hydrated_clone_says_nothing_more(
    capsys: pytest.CaptureFixture[str],
) -> None:
    reporter = Reporter(CloneOptions(source="a", dest="b"), Nowhere())
    reporter.progress(8 * MIB, 8 * MIB)
    reporter.hydrated()
    reporter.progress(8 * MIB, 8 * MIB)
    reporter.stopping()
    assert "stopped" not in capsys.readouterr().err
