# SPDX-License-Identifier: Apache-2.0
"""How long a failed request waits."""

import random

import pytest

from nbdtarget.devices.ranged.retry import (
    RETRY_S_MAX,
    RETRY_S_MIN,
    delay_s,
    retry_after_s,
)

NOW_S = 1_796_040_000.0  # Mon, 30 Nov 2026 12:00:00 GMT


def test_bound_doubles_and_has_an_end() -> None:
    source = random.Random(1)
    for nr in range(1, 2000):
        bound = min(RETRY_S_MIN * 2 ** min(nr - 1, 20), RETRY_S_MAX)
        assert 0 <= delay_s(nr, source) <= bound
    waits = [delay_s(20, source) for _ in range(300)]
    # Full jitter: all of the range is used, so that clients do not come back together.
    assert min(waits) < 0.1 * RETRY_S_MAX
    assert max(waits) > 0.9 * RETRY_S_MAX


def test_what_the_server_asks_for_is_the_least() -> None:
    assert delay_s(1, random.Random(1), 17.0) == 17.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("120", 120.0),
        (" 0 ", 0.0),
        ("Mon, 30 Nov 2026 12:00:30 GMT", 30.0),
        ("Mon, 30 Nov 2026 11:00:00 GMT", 0.0),  # it is over
        ("99999999999999999999", 3600.0),
        ("soon", None),
        ("-5", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after(text: str | None, seconds: float | None) -> None:
    assert retry_after_s(text, NOW_S) == seconds
