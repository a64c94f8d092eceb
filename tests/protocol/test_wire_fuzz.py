# SPDX-License-Identifier: Apache-2.0
"""The named seeds of the wire fuzzer, against the protocol's cores and a whole server."""

import pytest

from tests.support.wire_fuzz import FUZZERS
from tests.support.wire_seeds import SEEDS

CASES = [
    (fuzzer, outcome, seed)
    for fuzzer, seeds in SEEDS.items()
    for outcome, seed in seeds.items()
]


@pytest.mark.parametrize(
    ("fuzzer", "outcome", "seed"), CASES, ids=lambda part: str(part).replace(" ", "-")
)
def test_named_seed(fuzzer: str, outcome: str, seed: int) -> None:
    """To see one again: make fuzz-wire SEED=seed CASES=1 ARGS="--only 'fuzzer'"."""
    assert FUZZERS[fuzzer](seed) == outcome


def test_each_fuzzer_has_named_seeds() -> None:
    assert SEEDS.keys() == FUZZERS.keys()
    assert all(len(seeds) >= 10 for seeds in SEEDS.values())
