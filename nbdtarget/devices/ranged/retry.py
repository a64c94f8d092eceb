# SPDX-License-Identifier: Apache-2.0
"""How long to wait before a request is sent again.

Full jitter: a time between 0 and a bound that doubles with each failure in a row, from `RETRY_S_MIN` to `RETRY_S_MAX`. Clients
that have failed together do not come back together. A wait is never shorter than the server's Retry-After.
"""

import random
from email.utils import parsedate_to_datetime
from typing import Final

__all__ = ["RETRY_S_MAX", "RETRY_S_MIN", "delay_s", "retry_after_s"]

RETRY_S_MIN: Final = 0.2
RETRY_S_MAX: Final = 30.0
RETRY_AFTER_S_MAX: Final = 3600.0


def delay_s(
    nr_failures: int, source: random.Random, retry_after_s: float | None = None
) -> float:
    """Return the seconds to wait after `nr_failures` in a row, 1 or more."""
    assert nr_failures > 0
    # The exponent has a bound, because a source may be away for days.
    bound = min(RETRY_S_MAX, RETRY_S_MIN * 2.0 ** min(nr_failures - 1, 16))
    return max(source.uniform(0.0, bound), retry_after_s or 0.0)


def retry_after_s(text: str | None, now_s: float) -> float | None:
    """Return the seconds that a Retry-After header asks for; None: it says nothing that is understood.

    Args: now_s: Unix time, for a header that holds a date.
    """
    if text is None:
        return None
    text = text.strip()
    if text.isdecimal():
        return min(float(text[:12]), RETRY_AFTER_S_MAX)
    try:
        date = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError):
        return None
    return min(max(0.0, date.timestamp() - now_s), RETRY_AFTER_S_MAX)
