# SPDX-License-Identifier: Apache-2.0
"""The constructors of linear, zero and error: what they take and what they say."""

import pytest

from nbdtarget.common.errors import ConstructorError
from tests.support.dm import make_registry


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("linear", "linear: Invalid argument count"),
        ("linear /a", "linear: Invalid argument count"),
        ("linear /a 0 0", "linear: Invalid argument count"),
        ("linear /a x", "linear: Invalid device sector"),
        ("linear /a -1", "linear: Invalid device sector"),
        ("linear /a 18446744073709551616", "linear: Invalid device sector"),
        ("linear /nosuch 0", "linear: Device lookup failed: /nosuch: No such file"),
        (
            "linear /a 9",
            "linear: /a too small for target: start=9, len=8, dev_size=16",
        ),
        ("zero 1", "zero: No arguments required"),
        ("error /nosuch 0", "error: Device lookup failed: /nosuch: No such file"),
        ("error /a x", "error: Invalid device sector"),
        ("error /a 12abc", "error: Invalid device sector"),
        (
            "error /a 9",
            "error: /a too small for target: start=9, len=8, dev_size=16",
        ),
    ],
)
async def test_constructor_refuses(words: str, reason: str) -> None:
    registry, opener = make_registry(a=8192)
    with pytest.raises(ConstructorError) as caught:
        await registry.create("x", f"0 8 {words}")
    assert str(caught.value).startswith(reason)
    assert opener.still_open == []


@pytest.mark.parametrize("words", ["linear /a 8", "zero ", "error "])
async def test_table_can_be_loaded_again_as_it_is(words: str) -> None:
    registry, _ = make_registry(a=8192)
    device = await registry.create("x", f"0 8 {words}")
    assert [f"{t} {p}" for _, _, t, p in device.table()] == [words]
    assert await device.status() == [(0, 8, words.split()[0], "")]


async def test_linear_table_quotes_a_path_with_a_blank() -> None:
    registry, opener = make_registry()
    opener.sizes["/my disk"] = 4096
    device = await registry.create("x", r"0 8 linear /my\ disk 0")
    ((_, _, _, params),) = device.table()
    assert params == r"/my\ disk 0"


async def test_linear_takes_relative_paths_from_the_callers_directory() -> None:
    registry, opener = make_registry()
    opener.sizes["/srv/a"] = 4096
    await registry.create("x", "0 8 linear a 0", directory="/srv")
    assert opener.still_open == ["/srv/a"]


async def test_error_holds_its_device_open_and_sends_nothing_to_it() -> None:
    registry, opener = make_registry(a=8192)
    device = await registry.create("x", "0 8 error /a 0")
    assert registry.deps(device) == ["/a"]
    assert device.table() == [(0, 8, "error", "")]
    assert device.limits == opener.open["/a"].limits
    await registry.suspend("x")
    assert opener.open["/a"].log == []
    await registry.remove("x")
    assert opener.still_open == []
