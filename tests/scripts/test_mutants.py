# SPDX-License-Identifier: Apache-2.0
"""`make mutants`: how long a test may take to catch one."""

from scripts.mutants import TIMEOUT_S, parse_options
from tests.support.patience import PATIENCE_S


def test_a_test_that_waits_in_vain_has_time_to_fail() -> None:
    """It would be cut off otherwise, and the mutant would count as one that only hangs."""
    assert TIMEOUT_S >= PATIENCE_S + 60
    assert parse_options([]).timeout == TIMEOUT_S
