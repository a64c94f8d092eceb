# SPDX-License-Identifier: Apache-2.0
"""The named seeds of the wire fuzzer, against the protocol's cores and a whole server."""

import random

import pytest

from tests.support.certificates import needs_openssl
from tests.support.wire_bytes import BytesRandom, read_corpus
from tests.support.wire_fuzz import FUZZERS
from tests.support.wire_seeds import SEEDS

# This one makes certificates.
MARKS = {"server, tls": [needs_openssl]}
CASES = [
    pytest.param(fuzzer, outcome, seed, marks=MARKS.get(fuzzer, []))
    for fuzzer, seeds in SEEDS.items()
    for outcome, seed in seeds.items()
]


@pytest.mark.parametrize(
    ("fuzzer", "outcome", "seed"), CASES, ids=lambda part: str(part).replace(" ", "-")
)
def test_named_seed(fuzzer: str, outcome: str, seed: int) -> None:
    """To see one again: make fuzz-wire SEED=seed CASES=1 ARGS="--only 'fuzzer'"."""
    ended = FUZZERS[fuzzer](random.Random(seed))
    assert ended.outcome == outcome
    assert ended.nr_messages > 0


def test_each_fuzzer_has_named_seeds() -> None:
    assert SEEDS.keys() == FUZZERS.keys()
    assert all(len(seeds) >= 10 for seeds in SEEDS.values())


@pytest.mark.parametrize(
    "fuzzer",
    [pytest.param(name, marks=MARKS.get(name, [])) for name in FUZZERS],
    ids=lambda it: it.replace(" ", "-"),
)
def test_corpus(fuzzer: str) -> None:
    """Run the cases that the coverage-guided fuzzer (make fuzz-wire-guided) has kept."""
    cases = read_corpus(fuzzer)
    assert len(cases) >= 10
    outcomes = {FUZZERS[fuzzer](BytesRandom(case)).outcome for case in cases}
    assert len(outcomes) >= 5


def test_chosen_numbers_are_those_of_the_bytes_and_then_the_first() -> None:
    rng = BytesRandom(bytes([2, 128, 5]))
    assert rng.choice("abcd") == "c"
    assert rng.random() == 0.5
    assert rng.getrandbits(4) == 5
    assert (rng.choice("abcd"), rng.random(), rng.randbytes(3)) == ("a", 0.0, bytes(3))
    assert rng.randbytes(100) == rng.randbytes(100) != bytes(100)
