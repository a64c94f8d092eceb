# SPDX-License-Identifier: Apache-2.0
"""The policies that tables may name, and what cleaner and mq do otherwise than smq."""

import pytest

from nbdtarget.policies.base import MISS, WRITEBACK, PolicyConfigError
from nbdtarget.policies.cleaner import Cleaner
from nbdtarget.policies.mq import Mq
from nbdtarget.policies.registry import UnknownPolicyError, policy_type
from nbdtarget.policies.smq.policy import Smq
from tests.support.small_smq import BLOCK, S, new_smq

OLD_KEYS = [
    "random_threshold",
    "sequential_threshold",
    "discard_promote_adjustment",
    "read_promote_adjustment",
    "write_promote_adjustment",
]


def new_mq() -> Mq:
    return Mq(8, origin_size=1 << 30, block_size=BLOCK, now_ns=0)


def test_table_names_the_kernels_policies() -> None:
    names = {"smq": "smq", "mq": "mq", "cleaner": "cleaner", "default": "smq"}
    assert {name: policy_type(name).name for name in names} == names


@pytest.mark.parametrize("name", ["smq", "mq", "cleaner", "default"])
def test_all_are_version_2_with_hints_of_4_bytes(name: str) -> None:
    policy = policy_type(name)
    assert (policy.version, policy.hint_size) == ((2, 0, 0), 4)


@pytest.mark.parametrize("name", ["SMQ", "", "lru"])
def test_unknown_policy_is_refused_by_name(name: str) -> None:
    with pytest.raises(UnknownPolicyError) as caught:
        policy_type(name)
    assert repr(name) in str(caught.value)
    assert {"cleaner", "default", "mq", "smq"} <= set(caught.value.known)
    assert ", ".join(caught.value.known) in str(caught.value)


@pytest.mark.parametrize("kind", [Smq, Cleaner])
def test_smq_and_cleaner_take_no_keys(kind: type[Smq]) -> None:
    policy = new_smq(kind=kind)
    with pytest.raises(PolicyConfigError) as caught:
        policy.set_config_value("sequential_threshold", "8")
    assert str(caught.value) == "bad config value for sequential_threshold: 8"
    assert policy.config_values() == []


@pytest.mark.parametrize("key", OLD_KEYS)
def test_mq_takes_its_old_keys_and_says_that_they_are_ignored(key: str) -> None:
    warning = new_mq().set_config_value(key, "1024")
    assert warning == (
        f"tunable '{key}' no longer has any effect, mq policy is now an alias for smq"
    )


def test_mq_shows_its_old_keys_as_0() -> None:
    mq = new_mq()
    mq.set_config_value("random_threshold", "8")
    assert mq.config_values() == [(key, "0") for key in OLD_KEYS]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("sequential_threshold", "x"),
        ("sequential_threshold", "-1"),
        ("sequential_threshold", ""),
        ("sequential_threshold", "٣"),
        ("sequential_threshold", str(1 << 64)),
        ("sequential_threshold", "9" * 5000),
        ("migration_threshold", "1"),
        ("Sequential_threshold", "1"),
    ],
)
def test_mq_refuses_other_keys_and_what_is_no_number(key: str, value: str) -> None:
    with pytest.raises(PolicyConfigError, match=f"bad config value for {key}: "):
        new_mq().set_config_value(key, value)


@pytest.mark.parametrize("value", ["0", str((1 << 64) - 1), "0" * 30 + "7"])
def test_mq_takes_any_unsigned_long(value: str) -> None:
    assert new_mq().set_config_value("random_threshold", value) is not None


def dirty_cleaner() -> Smq:
    cleaner = new_smq(64, kind=Cleaner)
    for cblock in range(32):
        cleaner.load_mapping(cblock, cblock, False, 10)
        cleaner.set_dirty(cblock)
    return cleaner


def test_cleaner_never_promotes() -> None:
    cleaner = dirty_cleaner()
    cleaner.allow_migrations(True)
    for n in range(100):
        assert cleaner.lookup_with_work(1 << 20, True) == (MISS, None)
        cleaner.lookup(1 << 20, False)
        cleaner.tick(n)
    assert cleaner.residency == 32
    assert cleaner.lookup(5, True) == 5


def test_cleaner_writes_old_blocks_back_even_when_busy() -> None:
    cleaner = dirty_cleaner()
    assert cleaner.get_background_work(False) is None
    cleaner.tick(11 * S)
    cleaner.tick(22 * S)
    cleaner.tick(33 * S)
    works = [cleaner.get_background_work(False) for _ in range(33)]
    assert works[32] is None
    assert {work.op for work in works if work is not None} == {WRITEBACK}
    assert len({work.cblock for work in works if work is not None}) == 32


def test_cleaner_gets_done_however_often_its_blocks_are_hit() -> None:
    """Its period is a full minute, as in the kernel. If it were shorter, no block would grow old."""
    cleaner = dirty_cleaner()
    cleaned = set()
    for n in range(60 * 10):  # a tick each 100 ms, hundreds of hits and misses
        for nr in range(32):
            cleaner.lookup(nr, True)
            for far in range(4):
                cleaner.lookup((1 << 20) + far, False)
        cleaner.tick(n * S // 10)
        while (work := cleaner.get_background_work(False)) is not None:
            cleaned.add(work.cblock)
            cleaner.complete_background_work(work, True)
            cleaner.clear_dirty(work.cblock)
    assert cleaned == set(range(32))


def test_idle_cleaner_writes_everything_back() -> None:
    cleaner = dirty_cleaner()
    works = [cleaner.get_background_work(True) for _ in range(33)]
    assert [work is None for work in works] == [False] * 32 + [True]
