# SPDX-License-Identifier: Apache-2.0
"""A slice of the fuzzer; `make fuzz` runs it for as long as you like."""

from collections import Counter
from collections.abc import Callable

import pytest

from tests.support.metadata.fuzz import fuzz_chain, fuzz_image
from tests.support.metadata.fuzz_cache import fuzz_cache_image

CASES = 3000


def outcomes(fuzz: Callable[[int], str]) -> Counter[str]:
    found: Counter[str] = Counter()
    for seed in range(CASES):
        try:
            found[fuzz(seed)] += 1
        except BaseException as error:
            error.add_note(f"make fuzz SEED={seed} CASES=1")
            raise
    return found


@pytest.mark.long
@pytest.mark.slow
@pytest.mark.parametrize("fuzz", [fuzz_image, fuzz_cache_image])
def test_any_image_opens_right_or_is_refused(fuzz: Callable[[int], str]) -> None:
    found = outcomes(fuzz)
    # A fuzzer whose images are all refused, or all opened, looks at half of the code.
    for outcome in ("opened", "repaired", "CorruptMetadata", "NotOurs", "NotFormatted"):
        assert found[outcome] > 0, found
    assert found["opened"] + found["repaired"] > CASES // 10, found


@pytest.mark.long
@pytest.mark.slow
def test_any_chain_of_records_is_read_right_or_refused() -> None:
    found = outcomes(fuzz_chain)
    assert found["read+read"] > CASES // 10, found
    assert found["refused+refused"] > CASES // 10, found
