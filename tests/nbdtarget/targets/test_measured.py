# SPDX-License-Identifier: Apache-2.0
"""The output of `measure`, as recorded from a 6.12 kernel, with devices by path instead of by number."""

import pytest

from tests.support.tables import Disks

CACHE = (
    "target_name=cache,target_version={version},metadata_mode=rw,cache_metadata_device=/m,"
    "cache_device=/c,cache_origin_device=/o,{rest};"
)


@pytest.mark.parametrize(
    ("words", "measured"),
    [
        (
            "linear /o 2048",
            "target_name=linear,target_version=1.4.0,device_name=/o,start=2048;",
        ),
        (
            "striped 2 128 /c 2048 /o 4096",
            "target_name=striped,target_version=1.6.0,stripes=2,chunk_size=128,"
            "stripe_0_device_name=/c,stripe_0_physical_start=2048,stripe_0_status=A,"
            "stripe_1_device_name=/o,stripe_1_physical_start=4096,stripe_1_status=A;",
        ),
        ("delay /o 8192 0 /o 10240 5", ""),
        ("flakey /o 0 5 1 1 drop_writes", ""),
        ("zero", ""),
        ("error", ""),
        ("log-writes /o /c", ""),
    ],
)
async def test_targets_measure_as_the_kernels(words: str, measured: str) -> None:
    disks = Disks(m=4 << 20, c=16 << 20, o=64 << 20)
    device = await disks.create(f"0 2048 {words}")
    ((_, _, type_name, told),) = device.table(words=lambda each: each.measured_words())
    assert type_name == words.split()[0]
    assert told == measured


@pytest.mark.parametrize(
    ("words", "rest"),
    [
        (
            "1 writethrough smq 0",
            "writethrough=y,writeback=n,passthrough=n,metadata2=n,no_discard_passdown=n",
        ),
        (
            "3 metadata2 writeback no_discard_passdown default 0",
            "writethrough=n,writeback=y,passthrough=n,metadata2=y,no_discard_passdown=y",
        ),
    ],
)
async def test_a_cache_measures_as_the_kernels(words: str, rest: str) -> None:
    disks = Disks(m=4 << 20, c=16 << 20, o=64 << 20)
    device = await disks.create(f"0 131072 cache /m /c /o 128 {words}")
    assert device.active is not None
    version = ".".join(map(str, device.active.targets[0].version))
    ((*_, told),) = device.table(words=lambda each: each.measured_words())
    assert told == CACHE.format(version=version, rest=rest)


async def test_what_would_end_a_value_is_escaped() -> None:
    disks = Disks(**{"a,b;c=d\\e": 1 << 20})
    device = await disks.create(r"0 2048 linear /a,b;c=d\\e 0")
    ((*_, told),) = device.table(words=lambda each: each.measured_words())
    assert r"device_name=/a\,b\;c\=d\\e,start=0;" in told
