# SPDX-License-Identifier: Apache-2.0
import pytest

from nbdtarget.common.errors import NbdTargetError
from nbdtarget.config.limits import LIMIT_KEYS, parse_limits, with_limits
from nbdtarget.server.bounds import BOUNDS
from nbdtarget.server.limits import Limits


def test_each_bound_can_be_given() -> None:
    assert set(LIMIT_KEYS) == set(BOUNDS)
    for name in BOUNDS:
        value = getattr(Limits(), name)
        assert parse_limits([f"{name}={value}"]) == {name: value}


def test_sizes_have_suffixes_and_times_fractions() -> None:
    words = ["payload_max=64K", "linger_s=0.5", "connections_max=7"]
    limits = with_limits(Limits(), parse_limits(words))
    assert (limits.payload_max, limits.linger_s, limits.connections_max) == (
        65536,
        0.5,
        7,
    )


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["connections_max"], "write NAME=VALUE"),
        (["conections_max=1"], "did you mean connections_max"),
        (["zzz=1"], "there are connections_max, peer_connections_max"),
        (["turn_us=1"], "no bound is called so"),
        (["connections_max=0"], "must be 1 to 2147483647"),
        (["connections_max=1K"], "'1K' is no number"),
        (["payload_max=1X"], "'1X' is no number"),
        (["linger_s=nan"], "must be 0 to"),
        (["linger_s=1", "linger_s=2"], "is given twice"),
    ],
)
def test_mistake_is_named(words: list[str], reason: str) -> None:
    with pytest.raises(NbdTargetError, match=reason):
        parse_limits(words)


def test_bounds_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(NbdTargetError, match="payload_max 2147483648 is more than"):
        with_limits(Limits(), parse_limits(["payload_max=2G"]))
