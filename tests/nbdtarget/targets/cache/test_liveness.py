# SPDX-License-Identifier: Apache-2.0
"""Lives of a cache in which nothing may hang."""

import pytest

from tests.support.cache_liveness import Liveness


@pytest.mark.parametrize("may_fail", [False, True])
@pytest.mark.parametrize("seed", range(8))
async def test_everything_that_was_asked_for_ends(seed: int, may_fail: bool) -> None:
    await Liveness(seed, may_fail=may_fail).run(nr_rounds=50)
